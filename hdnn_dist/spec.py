"""The job as the user writes it, as frozen and validated values.

A spec file has five sections, all but the first with defaults::

    topology: who the agents are and who may talk to whom      -> TopologySpec
    model:    the H-DNN and where the graph enters it          -> ModelSpec
    data:     the data set and which agent sees what of it     -> DataSpec
    training: optimiser, schedule, regulariser, seed           -> TrainingSpec
    cluster:  how agents are packed into Ray actors            -> ClusterSpec

These are the forms of values alone. `hdnn_dist.reader` reads them from YAML, and whether the graph,
the data and the model fit one another is for `hdnn_dist.job` to say.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

AGENT_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
NAME_RULE = "use up to 64 letters, digits, '_' and '-', the first a letter or digit"

AgentName = Annotated[
    str,
    Field(
        pattern=AGENT_NAME,
        max_length=64,
        description="Letters, digits, '_' and '-'; it names the agent's checkpoint file.",
    ),
]
# Upper bounds are for slips, which would overflow or fill the memory at a later place.
MAX_SIZE = 10_000  # of a state, or layers
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Ratio = Annotated[float, Field(ge=1, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0, le=10**9)]
Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]
Threads = Annotated[int, Field(gt=0, le=1024)]
Classes = Annotated[int, Field(ge=2, le=MAX_SIZE)]
Pixels = Annotated[int, Field(ge=0, le=1024)]
Names = Annotated[list[str], Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: frozen, strict about unknown keys and about types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _by_shape(expected: str, **shapes: tuple[type | str, ...]) -> Discriminator:
    """Choose a union's branch by the form of the value: one message instead of one a branch.

    Args:
        expected: what is expected, for the message.
        shapes: the types, or the words, that stand for each tag.
    """

    def tag(value: Any) -> str | None:
        for name, forms in shapes.items():
            if any(isinstance(value, f) if isinstance(f, type) else value == f for f in forms):
                return name
        return None

    return Discriminator(tag, custom_error_type="shape", custom_error_message=expected)


def _by_key(key: str, default: type[Section], *others: type[Section]) -> Discriminator:
    """Choose a union's branch (tagged by class name) by a key; left out, it is the default."""
    names = {kind_of(cls, key): cls.__name__ for cls in (default, *others)}

    def tag(value: Any) -> str | None:
        kind = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        if kind is None and not (isinstance(value, dict) and key in value):
            return default.__name__
        return names.get(kind) if isinstance(kind, str) else None

    return Discriminator(
        tag,
        custom_error_type="kind",
        custom_error_message=" or ".join(names),
        custom_error_context={"key": key},
    )


def kind_of(cls: type[Section], key: str) -> str:
    """The one value that `key` has in `cls`, e.g. "sgd" for the name of SGD."""
    return str(get_args(cls.model_fields[key].annotation)[0])


# --- topology ------------------------------------------------------------------------------------


class AgentSpec(Section):
    """One agent: its name, the size ``d`` of each of its states ``p, q ∈ R^d``, what it needs."""

    name: AgentName
    d: Size | None = Field(default=None, description="Size of p and of q; default: topology.d.")
    cpu: NonNegative | None = Field(
        default=None,
        description="Cores for its actor; default: an equal share of the cluster, at most 1.",
    )
    gpu: NonNegative = Field(default=0.0, description="GPUs for its actor.")
    speed: Positive = Field(
        default=1.0,
        description="How fast its machine is beside the calibrated one: 0.25 is four times as "
        "slow. It never shares an actor with agents of another speed, and `check` predicts by it.",
    )
    resources: dict[str, Positive] = Field(
        default_factory=dict, description="Custom Ray resources its actor must be given."
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels its actor's node must carry."
    )


Number = int | Annotated[float, Field(allow_inf_nan=False)]
Argument = Annotated[
    Annotated[bool | Number | str, Tag("scalar")]
    | Annotated[
        list[
            Annotated[
                Annotated[Number, Tag("number")] | Annotated[list[Number], Tag("list")],
                _by_shape("a number or a list of numbers", number=(int, float), list=(list,)),
            ]
        ],
        Tag("list"),
    ],
    _by_shape(
        "a number, text, true, false or a list of numbers", scalar=(int, float, str), list=(list,)
    ),
]


class GeneratedEdges(Section):
    """Edges from a networkx graph generator, by name."""

    generator: str = Field(description="Name of a networkx generator, e.g. watts_strogatz_graph.")
    args: dict[str, Argument] = Field(
        default_factory=dict, description="Its arguments by name; a missing seed is 0."
    )


class FileEdges(Section):
    """Edges from a graph file, found relative to the spec's own folder."""

    file: str = Field(description="Path of a .graphml, .json (node-link) or .edgelist/.txt file.")


def _edges_tag(value: Any) -> str | None:
    if isinstance(value, list):
        return "list"
    if isinstance(value, dict):
        return "FileEdges" if "file" in value else "GeneratedEdges"
    return type(value).__name__ if isinstance(value, GeneratedEdges | FileEdges) else None


EdgeList = list[tuple[AgentName, AgentName]]
Edges = Annotated[
    Annotated[EdgeList, Tag("list")]
    | Annotated[GeneratedEdges, Tag("GeneratedEdges")]
    | Annotated[FileEdges, Tag("FileEdges")],
    Discriminator(
        _edges_tag,
        custom_error_type="shape",
        custom_error_message="a list of pairs, {generator: NAME, args: {…}} or {file: PATH}",
    ),
]
AgentEntry = Annotated[
    Annotated[AgentSpec, Tag("AgentSpec")] | Annotated[AgentName, Tag("name")],
    _by_shape("a name, or a section with a name", AgentSpec=(dict, AgentSpec), name=(object,)),
]


class TopologySpec(Section):
    """The graph of agents. An edge ``[l, i]`` says: agent ``i`` uses the state of agent ``l``."""

    name: str = Field(default="topology", description="A name for reports.")
    agents: (
        Annotated[
            Annotated[Count, Tag("count")] | Annotated[list[AgentEntry], Tag("list")],
            _by_shape("a list of agents, or how many", count=(int,), list=(list,)),
        ]
        | None
    ) = Field(
        default=None,
        description="A list of agents (names, or name/d/resources), or how many (a1, a2, …); "
        "left out, the generator's or the file's nodes are the agents.",
    )
    d: Size = Field(default=8, description="State size of every agent that names none of its own.")
    edges: Edges = Field(default_factory=list, description="Pairs, a generator, or a file.")
    directed: bool = Field(
        default=False, description="Whether edge [l, i] lets only i use l's state, not l use i's."
    )
    links: Literal["two-way", "one-way"] = Field(
        default="two-way",
        description="Whether the link under a directed edge also carries messages back. The "
        "backward pass needs it; with one-way links every way back must be an edge itself.",
    )


# --- model ---------------------------------------------------------------------------------------


class ReadoutSpec(Section):
    """Outputs ``Σ_i W^i [p^i; q^i] + c``, summed up a spanning tree to the root.

    With data.targets per agent there is no tree: each agent's are its own ``W^i [p^i; q^i] + c^i``.
    """

    agents: Annotated[
        Annotated[Literal["all"], Tag("all")] | Annotated[list[AgentName], Tag("list")],
        _by_shape("all, or a list of names", all=("all",), list=(list,)),
    ] = Field(default="all", description="Who contributes a term.")
    root: AgentName | None = Field(
        default=None, description="The agent that holds the labels; default: a centre of the graph."
    )


class LayerGraph(Section):
    """A graph for one layer's K, over the same agents and inside the topology's links."""

    edges: Edges = Field(description="As `topology.edges`.")


class MatrixFile(Section):
    """A matrix from a file, found relative to the spec's own folder."""

    file: str = Field(description="Path of a .npy file.")


def _matrix_tag(value: Any) -> str | None:
    if isinstance(value, dict | MatrixFile):
        return "MatrixFile"
    if isinstance(value, str):
        return "name" if value in ("J1", "J2") else None
    if not isinstance(value, list):
        return None
    row = value[0] if value else None
    entry = row[0] if isinstance(row, list) and row else None
    return "layers" if isinstance(entry, list) else "matrix"


Entry = Annotated[float, Field(allow_inf_nan=False, strict=False)]
Interconnection = Annotated[
    Annotated[Literal["J1", "J2"], Tag("name")]
    | Annotated[list[list[Entry]], Tag("matrix")]
    | Annotated[list[list[list[Entry]]], Tag("layers")]
    | Annotated[MatrixFile, Tag("MatrixFile")],
    Discriminator(
        _matrix_tag,
        custom_error_type="shape",
        custom_error_message="J1, J2, {file: PATH}, or the rows of a matrix",
    ),
]


Matrix = Annotated[
    Annotated[list[list[Entry]], Tag("matrix")] | Annotated[MatrixFile, Tag("MatrixFile")],
    _by_shape(
        "{file: PATH}, or the rows of a matrix", matrix=(list,), MatrixFile=(dict, MatrixFile)
    ),
]


class ModelSpec(Section):
    """A member of the H-DNN family (arXiv 2105.13205) and where the graph enters it."""

    name: Literal["H1", "H2", "MS1", "MS2", "MS3"] = Field(
        default="H2", description="The member: what is constrained, and how it is discretised."
    )
    graph: Literal["K", "J", "both"] = Field(
        default="K",
        description="K: T = A + I, X = I. J: T = I, R = A + I. both: T = R = A + I. "
        "J and both are for H1 and H2.",
    )
    layers: Size = Field(default=8, description="Depth N.")
    h: Positive = Field(default=0.25, description="Step of the discretisation.")
    activation: str = Field(
        default="tanh",
        description="σ: tanh, relu, leaky_relu, elu, sigmoid, or package.module:NAME of an "
        "hdnn_dist.hamiltonian.Activation of your own.",
    )
    J: Interconnection | None = Field(
        default=None,
        description="H1's skew-symmetric matrix on y = [p; q], all agents' p before all q, or one "
        "matrix a layer. J1 = [[0, I], [-I, 0]]; J2 = +1 above the diagonal, -1 below. "
        "Default: J1, or what model.graph puts there.",
    )
    X: Matrix | None = Field(
        default=None,
        description="H2's X, agent after agent, in J = [[0, -Xᵀ], [X, 0]]; with train_J where it "
        "starts. Default: the identity, or what model.graph puts there.",
    )
    layer_graphs: (
        list[
            Annotated[
                Annotated[LayerGraph, Tag("LayerGraph")]
                | Annotated[Literal["topology", "none"], Tag("word")],
                _by_shape(
                    "topology, none, or {edges: …}",
                    LayerGraph=(dict, LayerGraph),
                    word=("topology", "none"),
                ),
            ]
        ]
        | None
    ) = Field(
        default=None,
        min_length=1,
        description="T per layer, repeated in turn over the depth; default: the topology.",
    )
    train_J: bool = Field(
        default=False, description="Train H2's X (hence J), the same in every layer."
    )
    encoder: Literal["linear", "pad"] = Field(
        default="linear",
        description="linear: [p; q] = E x + e, learnt. pad: x itself enters p (or q), zeros "
        "elsewhere; neighbours are then sent raw features.",
    )
    readout: ReadoutSpec = ReadoutSpec()


# --- data ----------------------------------------------------------------------------------------


class AutoSplit(Section):
    """Equal runs of features in order (raster order in an image)."""

    kind: Literal["auto"] = "auto"
    agents: list[AgentName] | None = Field(
        default=None, description="Who sees input; default: everyone."
    )


class PatchSplit(Section):
    """A grid of rectangular image patches, row by row, one an agent."""

    kind: Literal["patches"]
    grid: tuple[Count, Count] = Field(description="Patches down and across.")
    agents: list[AgentName] | None = Field(
        default=None, description="Who sees input; default: everyone."
    )


class StripeSplit(Section):
    """Horizontal or vertical image stripes, one an agent."""

    kind: Literal["stripes"]
    axis: Literal["rows", "columns"] = Field(
        default="rows", description="Whether a stripe is some rows of the image, or some columns."
    )
    agents: list[AgentName] | None = Field(
        default=None, description="Who sees input; default: everyone."
    )


class IndexSplit(Section):
    """Explicit feature indices per agent."""

    kind: Literal["indices"]
    indices: dict[AgentName, list[Annotated[int, Field(ge=0)]]] = Field(
        description="Per agent, the features that it sees, from 0."
    )
    enter: dict[AgentName, Literal["p", "q"]] = Field(
        default_factory=dict,
        description="With encoder pad: the state that an agent's features enter; default p.",
    )


class ColumnSplit(Section):
    """Names of a table's columns per agent."""

    kind: Literal["columns"]
    columns: dict[AgentName, list[str]] = Field(
        description="Per agent, the columns that it sees; who is left out sees none."
    )


Split = Annotated[
    Annotated[AutoSplit, Tag("AutoSplit")]
    | Annotated[PatchSplit, Tag("PatchSplit")]
    | Annotated[StripeSplit, Tag("StripeSplit")]
    | Annotated[IndexSplit, Tag("IndexSplit")]
    | Annotated[ColumnSplit, Tag("ColumnSplit")],
    _by_key("kind", AutoSplit, PatchSplit, StripeSplit, IndexSplit, ColumnSplit),
]
DataName = Literal["digits", "mnist", "swiss_roll", "double_circles", "double_moons", "table"]


class DataSpec(Section):
    """The data set, and which agent sees which of its features."""

    name: DataName = Field(
        default="digits", description="A built-in data set, or `table`: data of your own."
    )
    dir: str | None = Field(
        default=None,
        description="Folder of the MNIST files, relative to this file's; default: $HDNN_DATA, "
        "then the cache. Of a table: the folder of its files train and test, as .csv, .parquet or "
        ".safetensors.",
    )
    target: str = Field(
        default="target", description="The column of a table that holds the classes."
    )
    classes: (
        Annotated[
            Annotated[Classes, Tag("count")]
            | Annotated[list[str], Field(min_length=2), Tag("list")],
            _by_shape("a list of names, or how many", count=(int,), list=(list,)),
        ]
        | None
    ) = Field(
        default=None,
        description="The classes of a table, in order, or how many whole numbers from 0.",
    )
    targets: (
        Annotated[
            Annotated[Names, Tag("list")] | Annotated[dict[AgentName, Names], Tag("map")],
            _by_shape("a list of columns, or one per agent", list=(list,), map=(dict,)),
        ]
        | None
    ) = Field(
        default=None,
        min_length=1,
        description="Columns of a table that hold numbers to predict (regression), in place of "
        "classes. A list: read out at the root. Columns per agent: each of these reads out its "
        "own by itself, and no one else sees them.",
    )
    split: Split = Field(default=AutoSplit(), description="Which agent sees which features.")
    train_samples: Count | None = Field(default=None, description="Use only the first so many.")
    test_samples: Count | None = Field(default=None, description="Likewise for the test set.")


# --- training ------------------------------------------------------------------------------------


class SGD(Section):
    """Stochastic gradient descent (torch.optim.SGD)."""

    name: Literal["sgd"]
    lr: Positive = Field(default=0.1, description="Learning rate, before the schedule.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Share of the last step that is taken again."
    )
    weight_decay: NonNegative = Field(default=0.0, description="Weight decay.")


class Adam(Section):
    """Adam, weight decay as an L2 gradient (torch.optim.Adam)."""

    name: Literal["adam"] = "adam"
    lr: Positive = Field(default=0.01, description="Learning rate, before the schedule.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999),
        description="Decay of the running means of the gradient and of its square.",
    )
    weight_decay: NonNegative = Field(default=0.0, description="Weight decay.")


class AdamW(Section):
    """Adam with decoupled weight decay (torch.optim.AdamW)."""

    name: Literal["adamw"]
    lr: Positive = Field(default=0.01, description="Learning rate, before the schedule.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999),
        description="Decay of the running means of the gradient and of its square.",
    )
    weight_decay: NonNegative = Field(default=0.01, description="Weight decay.")


Optimizer = Annotated[
    Annotated[Adam, Tag("Adam")] | Annotated[SGD, Tag("SGD")] | Annotated[AdamW, Tag("AdamW")],
    _by_key("name", Adam, SGD, AdamW),
]


class Constant(Section):
    """The learning rate stays as it is."""

    name: Literal["constant"] = "constant"


class Step(Section):
    """The learning rate is multiplied by gamma every so many epochs."""

    name: Literal["step"]
    every: Count = Field(description="Epochs between two cuts.")
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(default=0.1, description="Factor of a cut.")


class Cosine(Section):
    """Half a cosine from lr down to final · lr over the whole run."""

    name: Literal["cosine"]
    final: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Where it ends, as a part of lr."
    )


class OneCycle(Section):
    """Cosine up from lr/start to lr for a part of the run, then down to lr/end (Smith 2017)."""

    name: Literal["one-cycle"]
    warmup: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.3, description="Part of the run in which it rises."
    )
    start: Ratio = Field(default=25.0, description="It starts at lr / start.")
    end: Ratio = Field(default=1e4, description="It ends at lr / end.")


Schedule = Annotated[
    Annotated[Constant, Tag("Constant")]
    | Annotated[Step, Tag("Step")]
    | Annotated[Cosine, Tag("Cosine")]
    | Annotated[OneCycle, Tag("OneCycle")],
    _by_key("name", Constant, Step, Cosine, OneCycle),
]


class Distort(Section):
    """Smooth random maps of the plane, one a training image (Simard, Steinkraus, Platt 2003).

    Each agent sees its own pixels of the distorted image; to find them it reads all pixels of the
    training images itself. Test images are not distorted, and an agent reads its own pixels alone.
    """

    rotate: Annotated[float, Field(ge=0, le=180)] = Field(
        default=0.0, description="Degrees, up to so many either way, about the centre."
    )
    scale: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Height and width, each by a factor of 1 ± up to this."
    )
    shear: Annotated[float, Field(ge=0, le=60)] = Field(
        default=0.0, description="Slant of vertical lines, in degrees, up to so many either way."
    )
    shift: Annotated[float, Field(ge=0, le=1024)] = Field(
        default=0.0, description="Pixels, also fractions, down and right, up to so many either way."
    )
    elastic: Annotated[float, Field(ge=0, le=1024)] = Field(
        default=0.0,
        description="Pixels: root mean square of each component of a smooth random field.",
    )
    sigma: Annotated[float, Field(ge=1, le=1e6)] = Field(
        default=4.0,
        description="Pixels: how smooth that is, as the deviation of a Gaussian that blurs it.",
    )


class TrainingSpec(Section):
    """How the weights are found. All of it is local to an agent but the clipping norm."""

    epochs: Count = Field(default=20, description="Passes through the training set.")
    batch_size: Count = Field(
        default=64, description="Samples a step; the whole training set, where that is smaller."
    )
    optimizer: Optimizer = Field(default=Adam(), description="An agent's own, of its weights.")
    schedule: Schedule = Field(default=Constant(), description="Course of the learning rate.")
    activations: Literal["store", "recompute"] = Field(
        default="store",
        description="store: an agent keeps its states of all layers for the backward pass. "
        "recompute: of the last layer alone, and each layer is taken back, which costs the "
        "forward's rounds once more; for H2, MS1 and MS3.",
    )
    messages: Literal["full", "bf16", "fp16"] = Field(
        default="full",
        description="Type in which states, cotangents and scores travel between agents; full: that "
        "of dtype. bf16 and fp16 round them to 8 and 11 bits, also between agents of one actor; "
        "fp16 loses what is below 6e-8, as cotangents may be.",
    )
    clip_norm: Positive | None = Field(
        default=None,
        description="Clip the gradient of all agents to this norm, summed over the tree.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="What a step does whose states or gradients are not finite numbers: it stops "
        "the run, or no agent takes it (which all agents learn over the tree, as for clip_norm).",
    )
    alpha: NonNegative = Field(
        default=0.0,
        description="Weight α of the paper's α h/2 Σ_j ‖K_{j+1}-K_j‖² + ‖b_{j+1}-b_j‖².",
    )
    shift: Pixels = Field(
        default=0,
        description="Augmentation: each agent's image part moves by up to so many pixels.",
    )
    distort: Distort | None = Field(
        default=None,
        description="Augmentation: whole images are rotated, scaled, slanted, moved and bent.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="Of initial weights, sample order and augmentation."
    )
    dtype: Literal["float32", "float64"] = Field(
        default="float32", description="Type of weights, states and messages."
    )
    eval_every: Count = Field(
        default=1, description="Epochs between two evaluations on the test set."
    )
    checkpoint_every: Count = Field(default=1, description="Epochs between two checkpoints.")
    keep_last: Count = Field(default=3, description="How many of the newest checkpoints are kept.")
    keep_best: bool = Field(
        default=True,
        description="Whether the checkpoint with the best test accuracy, or R² of a regression, is "
        "kept beside them.",
    )


# --- cluster -------------------------------------------------------------------------------------


class ClusterSpec(Section):
    """How agents become Ray actors."""

    agents_per_actor: Count | Literal["auto"] = Field(
        default=1, description="Agents that share one actor; auto: one actor a core of the cluster."
    )
    replicas: Annotated[int, Field(gt=0, le=10**4)] = Field(
        default=1,
        description="Copies of the whole graph of agents, each on its share of every batch; "
        "gradients are summed between the copies of an agent. --local runs one.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="What agents compute on; auto: the GPU for those that ask for one (gpu) where "
        "there is one, else the CPU.",
    )
    address: str | None = Field(
        default=None,
        description="Ray cluster to join; default: $RAY_ADDRESS, else one is started here.",
    )
    wire: Literal["auto", "gloo"] = Field(
        default="auto",
        description="What carries messages between actors; auto: sockets between those on one "
        "machine, gloo between machines.",
    )
    logs: Literal["text", "json"] = Field(
        default="text",
        description="Form of what is logged on stderr, by actors in Ray's worker logs; json: one "
        "object a line, of the run's course too, with time, level, message, node, agents and step.",
    )
    placement: Literal["spread", "pack"] = Field(
        default="pack", description="Over the cluster's nodes."
    )
    timeout: Positive = Field(
        default=60.0,
        description="Seconds after which a message or a placement that does not come fails.",
    )
    max_restarts: Annotated[int, Field(ge=0, le=10**6)] = Field(
        default=3,
        description="How often a run goes on by itself from its last checkpoint, on the machines "
        "that are left, after it has lost actors (see on_agent_loss).",
    )
    on_agent_loss: Literal["stop", "restart", "drop"] = Field(
        default="restart",
        description="When actors are lost: stop the run; start all agents anew; or go on without "
        "the agents that were lost, as long as all others reach the readout.",
    )
    threads: Threads | None = Field(
        default=None,
        description="Torch threads a process; default: one, as the products of an agent are small.",
    )


class Spec(Section):
    """One training job."""

    topology: TopologySpec
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    training: TrainingSpec = TrainingSpec()
    cluster: ClusterSpec = ClusterSpec()
