"""``python -m fisher_ray`` is ``fisher-ray``."""

from fisher_ray.cli import main

if __name__ == "__main__":
    main()
