import pytest

import fisher_ray


@pytest.mark.parametrize("name", fisher_ray.__all__)
def test_every_public_name_can_be_used(name):
    assert callable(getattr(fisher_ray, name))
    assert name in dir(fisher_ray)


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fisher_ray.nothing  # noqa: B018
