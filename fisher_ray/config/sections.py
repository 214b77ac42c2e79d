"""The sections of the configuration: small frozen models, checked once, without side effects."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fisher_ray.config.section import Section

Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0, strict=True)]  # strict: YAML's `true` is not 1
PositiveFloat = Annotated[float, Field(gt=0)]


def _word(value: Any) -> Any:
    return "true" if value is True else value  # which is what YAML makes of the bare word


Kind = Literal["kronecker", "random", "sketch", "topk", "identity"]
Labels = Annotated[
    Literal["all", "true", "sampled", "uniform"],
    BeforeValidator(_word, json_schema_input_type=Literal["all", "true", "sampled", "uniform", True]),
]


class SourceConfig(Section):
    """Where one split's rows come from."""

    format: Literal["parquet", "arrow", "images", "webdataset", "numpy", "zarr", "torch"] = "parquet"
    """``parquet``, ``arrow`` (a dataset saved by Hugging Face's ``datasets``, or Arrow files): a column of encoded
    pictures and one of labels; ``images``: a folder with a folder of pictures for each class; ``webdataset``: tar files
    of ``NAME.jpg`` and ``NAME.cls``; ``numpy``, ``zarr``: arrays; ``torch``: a map-style dataset."""
    path: str | None = None
    """File, glob (files in sorted order) or URL, joined to ``data.root``; an ``.npz`` or Zarr group has ``inputs`` and
    ``labels``."""
    rows: tuple[int, int] | None = None
    """``[start, stop)`` over the files in order (of ``images``: in an order of their own, which mixes the classes);
    null: all."""
    classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Of ``images``: the classes' folders, in the order of the labels; null: all, sorted by name."""
    image_column: str = "image"
    """Of formats that have columns: encoded pictures, as binary or as a struct with ``bytes``."""
    label_column: str = "label"
    """Likewise: integers from 0."""
    factory: str | None = None
    """``module:function`` returning a map-style dataset of ``(input, label)``, for ``format: torch``."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``factory``."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        wanted, other = ("factory", "path") if self.format == "torch" else ("path", "factory")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(f"format {self.format!r} takes {wanted!r} and not {other!r}")
        if self.classes is not None and (self.format != "images" or len(set(self.classes)) < len(self.classes)):
            raise ValueError("classes names each class of format 'images' once")
        if self.rows is not None and not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"rows {list(self.rows)} is not a range [start, stop) with 0 <= start < stop")
        return self


class DataConfig(Section):
    """The three splits, and how a row becomes a tensor."""

    root: str = "."
    """Folder or URL that the paths are joined to."""
    on_error: Literal["stop", "skip"] = "stop"
    """What becomes of the run at a row that cannot be used: it stops, or leaves the row out and lists it."""
    train: SourceConfig | None = None
    """Rows that train the base network; left out with a checkpoint."""
    shallow: SourceConfig
    """Rows that metric, features and linear model are made from."""
    test: SourceConfig
    """Rows that every model is compared on."""
    transform: str | None = None
    """``module:function`` called as ``transform(image, generator)`` with a PIL image, or an array from array sources;
    the generator is null but where a network is trained. It returns a float tensor, or one of int64 for a
    network that takes tokens."""


class ModelConfig(Section):
    """The network: ``factory(**kwargs)`` and, optionally, its state dict."""

    factory: str
    """``module:function`` or ``module:Class.method`` that returns the network, an ``nn.Module`` from inputs to logits
    or to an object with ``logits``."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``factory``."""
    checkpoint: str | None = None
    """State dict of the network, a safetensors file or one of ``torch.save``; then leave ``base`` out."""
    pretrained: bool = False
    """Whether the network that ``factory`` returns is trained already; then leave ``base`` and ``checkpoint`` out."""


class BaseConfig(Section):
    """Brief training of the base network, by SGD."""

    steps: PositiveInt
    """Batches that it is trained on: stop early."""
    batch_size: PositiveInt = 64
    """Samples of a batch."""
    lr: PositiveFloat = 0.05
    """Learning rate, constant."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Of SGD."""
    snapshots: tuple[PositiveInt, ...] = ()
    """Steps after which the weights are also kept, as ``base/step-N.safetensors``."""


class ConvergenceConfig(Section):
    """Training until it gains nothing more on validation rows.

    The learning rate is constant, and divided by ten each time that ``patience`` looks at the validation rows were no
    better than the best before; the third time, it is over, and the weights that did best are kept.
    """

    evaluate_steps: PositiveInt = 500
    """Steps between two looks."""
    patience: PositiveInt = 4
    """Looks without a gain before the learning rate falls."""
    max_steps: PositiveInt = 50_000
    """Steps after which it is over in any case."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the shallow split's rows that are not trained on; the first 4,096 of them are looked at."""


class TrainedOnConfig(Section):
    """The comparison's trained-on network: SGD from the base network, for the time that the shallow model took.

    What is left out is as in ``base``, or else as its defaults; the learning rate falls linearly to zero.
    """

    batch_size: PositiveInt | None = None
    """Samples of a batch."""
    lr: PositiveFloat | None = None
    """Learning rate at the start."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of SGD."""
    seconds: Literal["auto"] | PositiveFloat = "auto"
    """``auto``: what metric, features of the training rows and linear model took."""
    convergence: ConvergenceConfig | None = None
    """Given, the base network is also trained on for as long as it gains by it."""


class ScoresConfig(Section):
    """Which labels' scores, of which parameters (glob)."""

    labels: Labels = "all"
    """Of which labels: ``all`` classes, the ``true`` one, one ``sampled`` from the network's own distribution, or one
    drawn from the ``uniform`` one."""
    parameters: str = "*"
    """Glob over the names of the network's parameters; frozen ones are left out in any case."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network's forward and backward; weights, factors and all that is made of them are float32 in any case."""
    class_buckets: Annotated[int, Field(ge=2)] | None = None
    """With more classes than this, so many buckets of classes with random signs take their place, and a pass costs what
    so many classes cost; features are of buckets then, and their dot products those of all classes but for an error
    that is zero on average. 64 is a good number. Null: every class by itself. With ``labels: all``."""

    @model_validator(mode="after")
    def _check(self) -> ScoresConfig:
        if self.class_buckets is not None and self.labels != "all":
            raise ValueError("class_buckets are of all classes' scores. Set labels: all, or leave them out")
        return self

    def num_scores(self, num_classes: int) -> int:
        """Return how many scores a sample has."""
        if self.labels != "all":
            return 1
        return num_classes if self.class_buckets is None else min(num_classes, self.class_buckets)


class LayerCompressionConfig(Section):
    """Another compression for some layers."""

    kind: Kind | None = None
    """As the run's if left out."""
    dim: PositiveInt | None = None
    """Coordinates of each such layer; if left out, its part of what the run's ``dim`` leaves."""

    @model_validator(mode="after")
    def _check(self) -> LayerCompressionConfig:
        if self.kind is None and self.dim is None:
            raise ValueError("give a kind or a dim")
        if self.kind == "identity" and self.dim is not None:
            raise ValueError("identity keeps every entry: it takes no dim")
        return self


class CompressionConfig(Section):
    """From P parameters to D coordinates, layer by layer.

    ``kronecker``: eigenvectors of the layer's second moments of inputs and backpropagated factors, the products with
    the largest eigenvalue products over all such layers; ``random``: two-sided Gaussian projection of the factors;
    ``sketch``: sparse Johnson-Lindenstrauss; ``topk``: the largest entries of each gradient, then such a sketch;
    ``identity``: every entry.
    """

    kind: Kind = "kronecker"
    """Of the layers that ``layers`` says nothing else of."""
    dim: PositiveInt = 1024
    """D, spread over the layers by eigenvalue (``kronecker``) or by size; ``identity`` needs none."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Of each layer's entries, those that ``topk`` keeps."""
    layers: dict[str, LayerCompressionConfig] = Field(default_factory=dict)
    """By glob over the layers' names; the first that matches holds."""

    @property
    def kinds(self) -> set[Kind]:
        """Every kind that is asked for."""
        return {self.kind, *(layer.kind for layer in self.layers.values() if layer.kind is not None)}


class AbsoluteDamping(Section):
    """Damping in the eigenvalues' own unit."""

    absolute: Annotated[float, Field(ge=0, strict=True)]
    """What is added to every eigenvalue."""


class MetricConfig(Section):
    """The low-rank Fisher metric in the D coordinates."""

    estimator: Literal["exact", "nystrom", "frequent_directions", "diagonal"] = "exact"
    """``exact``: the whole sum, D x D; ``nystrom``: a sketch ``F Ω`` of it, D x ``size``; ``frequent_directions``:
    ``size`` rows, D wide; ``diagonal``: D numbers."""
    structure: Literal["global", "block", "adjacent"] = "global"
    """Which layers' products count: of all, of each by itself, or of each with its neighbours."""
    rank: PositiveInt = 1024
    """R, the eigenvectors that are kept: features of each score."""
    size: PositiveInt | None = None
    """Of the sketch of ``nystrom`` or ``frequent_directions``; twice the rank if left out."""
    damping: Literal["auto"] | Annotated[float, Field(ge=0, strict=True)] | AbsoluteDamping = "auto"
    """Relative to the mean eigenvalue; ``{absolute: x}`` in its own unit; ``auto`` minimises the held-out log-det
    divergence. With ``structure: block`` each layer has its own."""
    labels: Labels | None = None
    """Whose scores the metric is of: ``all``, the exact Fisher; ``sampled``, a Monte Carlo estimate; ``true``, the
    empirical Fisher; ``uniform``, of labels that are all as likely. As ``scores.labels`` if left out."""
    draws: PositiveInt = 1
    """Labels drawn for each sample, where they are drawn."""
    centered: bool = False
    """Whether the mean score's outer product is subtracted; over all classes that mean is zero."""
    fraction: Fraction = 0.1
    """Share of the shallow split's units that the metric is made from."""

    @model_validator(mode="after")
    def _check(self) -> MetricConfig:
        allowed = {"exact": ("global", "block", "adjacent"), "diagonal": ("global",)}
        structures = allowed.get(self.estimator, ("global", "block"))
        if self.structure not in structures:
            raise ValueError(
                f"estimator {self.estimator!r} has structure {' or '.join(structures)}, not {self.structure!r}"
            )
        if self.size is not None and self.estimator not in ("nystrom", "frequent_directions"):
            raise ValueError(f"size is of a sketch, which estimator {self.estimator!r} has not")
        if self.size is not None and self.size < self.rank:
            raise ValueError(f"size {self.size} of the sketch is less than rank {self.rank}")
        if self.centered and self.estimator == "frequent_directions":
            raise ValueError("frequent_directions cannot subtract the mean: take another estimator, or centered: false")
        if self.labels is not None:
            self.check_labels(self.labels)
        return self

    def check_labels(self, labels: str) -> None:
        """Refuse options that have no meaning for these labels.

        Raises:
            ValueError: if there are some.
        """
        if self.centered and labels == "all":
            raise ValueError("centered: over all classes the mean score is zero. Leave it out, or draw labels.")
        if self.draws > 1 and labels not in ("sampled", "uniform"):
            raise ValueError(f"draws {self.draws}: labels {labels!r} are not drawn")


class StoreConfig(Section):
    """How features are stored."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """float16 is scaled to fit; bfloat16 has its range of itself, and an eighth of the precision."""
    chunk_rows: PositiveInt = 1024
    """Rows of a chunk; ``runtime.unit_rows`` is a multiple of it."""
    codec: Literal["none", "zstd", "blosc"] = "none"
    """Compression of the chunks; features compress by a tenth or so."""
    shard_rows: PositiveInt | None = None
    """Rows of one file, where it is to hold several chunks (a Zarr shard): fewer and larger objects."""


class LinearConfig(Section):
    """The shallow model."""

    model: Literal["ridge", "logistic", "gradnet"] = "ridge"
    """``ridge``: least squares in closed form; ``logistic``: multinomial logistic regression; ``gradnet``: GradNet
    alone, without metric, features and linear model; beside another model it is run where the section ``gradnet`` is
    given."""
    views: Literal[1, 2] = 1
    """2: an image and its mirror image."""
    view_mode: Literal["average", "stack"] = "average"
    """``average``: the views' features are averaged before they are stored. ``stack``: every view's are stored, the
    model is fitted on each as on a row of its own, and its scores are averaged over a sample's views."""
    hidden: bool = True
    """Also use the last hidden layer (the last layer's input factor)."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training rows cut off to choose the penalty."""
    penalties: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """Grid, relative to the mean diagonal of the standardised Gram matrix; ``ridge`` has them all from one
    factorisation, so more of them cost it little."""
    ranks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """How many features of each score ``ridge`` uses, those of the largest eigenvalues: the validation rows choose
    among these too; null: all."""
    dampings: Annotated[tuple[Annotated[float, Field(ge=0)] | None, ...], Field(min_length=1)] = (None,)
    """The same for the damping of the features that ``ridge`` sees, relative to the mean eigenvalue; null: columns are
    standardised, which takes any damping out."""
    class_weights: Literal["none", "balanced"] | dict[Annotated[int, Field(ge=0)], PositiveFloat] = "none"
    """``balanced``: every class counts the same; or by class, as how many rows its rows count (1 if not named)."""
    solver: Literal["full_batch", "minibatch"] = "full_batch"
    """Of ``logistic``. ``full_batch``: L-BFGS preconditioned by the columns' Gram matrix, the same bits for any number
    of workers. ``minibatch``: Adam on batches that stream from the feature store, the same bits for the same number of
    workers; its memory grows with the columns, not with their square."""
    max_steps: PositiveInt = 40
    """L-BFGS steps of solver ``full_batch``."""
    epochs: PositiveInt = 20
    """Of solver ``minibatch``, like those that follow: passes over the rows for each penalty, and for the last fit. The
    smaller the penalty, and the more columns there are for each row, the more it takes to come near the optimum."""
    batch_size: PositiveInt = 256
    """Rows of all workers together between two steps."""
    lr: PositiveFloat = 0.01
    """Learning rate of Adam on standardised columns; it falls to zero like half a cosine."""
    checkpoint_steps: PositiveInt = 500
    """Steps after which the state is kept in the run folder."""

    @property
    def num_stacked(self) -> int | None:
        """How many views' features are stored side by side; None if their average is."""
        return self.views if self.view_mode == "stack" else None

    @model_validator(mode="after")
    def _check(self) -> LinearConfig:
        if self.model != "ridge" and (self.ranks is not None or self.dampings != (None,)):
            raise ValueError(f"ranks and dampings are chosen among by model 'ridge' alone, not {self.model!r}")
        if self.view_mode == "stack" and self.model == "gradnet":
            raise ValueError("view_mode 'stack' is of features, which model 'gradnet' has not")
        if self.solver == "minibatch" and self.model != "logistic":
            raise ValueError(f"solver 'minibatch' is of model 'logistic' alone, not {self.model!r}")
        return self


class RuntimeConfig(Section):
    """Workers and units."""

    num_workers: Literal["auto"] | PositiveInt = "auto"
    """``auto``: as many as the cluster has room for."""
    cpus_per_worker: PositiveInt = 1
    """Cores of each worker, and its threads."""
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Of each worker, fractions too; ``auto``: one where the cluster has any."""
    unit_rows: PositiveInt = 2048
    """Rows that a worker is given at a time: what runs again when it is lost."""
    micro_batch: Literal["auto"] | PositiveInt = "auto"
    """Samples whose scores are computed together; ``auto``: what ``memory_bytes`` allow, up to 64, on GPUs 1,024."""
    memory_bytes: PositiveInt = 2**31
    """What a micro-batch's tensors may hold at once in each worker, the network's weights aside."""
    max_attempts: PositiveInt = 3
    """How often a unit may fail by itself, or lose its worker, before its rows are looked at one by one."""
    wait_s: PositiveFloat = 600.0
    """How long a run waits for its first worker, or for another when it has lost the last."""
    unit_timeout_s: PositiveFloat | None = None
    """After how long a worker is given up that has not come back with its unit, twice as long while it has two;
    ``null``: never."""
    checkpoint_units: PositiveInt | None = 8
    """Units whose merged sum is kept in the run folder while a pass runs, so that a resumed pass does not start over;
    rounded up to a power of two; ``null`` keeps none."""
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Custom resources that each worker takes, by Ray's names."""
    placement: Literal["packed", "spread"] = "packed"
    """Whether workers fill one machine after the other, or are spread over all."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray's runtime environment of the workers (``env_vars``, ``pip``, ``working_dir``, …)."""

    @model_validator(mode="after")
    def _check(self) -> RuntimeConfig:
        if wrong := {"CPU", "GPU"} & set(self.resources):
            raise ValueError(f"resources names {', '.join(sorted(wrong))}: set cpus_per_worker or gpus_per_worker")
        return self
