"""The job as the user writes it: YAML to frozen, validated values.

A spec file has five sections, all but the first with defaults::

    topology: who the agents are and who may talk to whom      -> TopologySpec
    model:    the H-DNN and where the graph enters it          -> ModelSpec
    data:     the data set and which agent sees what of it     -> DataSpec
    training: optimiser, schedule, regulariser, seed           -> TrainingSpec
    cluster:  how agents are packed into Ray actors            -> ClusterSpec

This is the only module that reads YAML. It knows the form of a spec; whether the graph, the data
and the model fit one another is for `hdnn_dist.job` to say.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

AgentName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$",
        max_length=64,
        description="Letters, digits, '_' and '-'; it names the agent's checkpoint file.",
    ),
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Base of every section: frozen, strict about unknown keys and about types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# --- topology ------------------------------------------------------------------------------------


class AgentSpec(Section):
    """One agent: its name, the size ``d`` of each of its states ``p, q ∈ R^d``, what it needs."""

    name: AgentName
    d: Count | None = Field(None, description="Size of p and of q; default: topology.d.")
    cpu: NonNegative | None = Field(
        None, description="Cores for its actor; default: an equal share of the cluster, at most 1."
    )
    gpu: NonNegative = Field(0.0, description="GPUs for its actor.")
    resources: dict[str, Positive] = Field(
        default_factory=dict, description="Custom Ray resources its actor must be given."
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels its actor's node must carry."
    )


class GeneratedEdges(Section):
    """Edges from a networkx graph generator, by name."""

    generator: str = Field(description="Name of a networkx generator, e.g. watts_strogatz_graph.")
    args: dict[str, bool | int | float | str | list[int] | list[float] | list[list[float]]] = Field(
        default_factory=dict, description="Its arguments by name; a missing seed is 0."
    )


class FileEdges(Section):
    """Edges from a graph file, found relative to the spec's own folder."""

    file: str = Field(description="Path of a .graphml, .json (node-link) or .edgelist/.txt file.")


EdgeList = list[tuple[AgentName, AgentName]]
Edges = EdgeList | GeneratedEdges | FileEdges


class TopologySpec(Section):
    """The graph of agents. An edge ``[l, i]`` says: agent ``i`` uses the state of agent ``l``."""

    name: str = Field("topology", description="A name for reports.")
    agents: Count | list[AgentSpec | AgentName] | None = Field(
        None,
        description="A list of agents (names, or name/d/resources), or how many (a1, a2, …); "
        "left out, the generator's or the file's nodes are the agents.",
    )
    d: Count = Field(8, description="State size of every agent that names none of its own.")
    edges: Edges = Field(default_factory=list, description="Pairs, a generator, or a file.")
    directed: bool = Field(
        False, description="Whether edge [l, i] lets only i use l's state, not l use i's."
    )
    links: Literal["two-way", "one-way"] = Field(
        "two-way",
        description="Whether the link under a directed edge also carries messages back. The "
        "backward pass needs it; with one-way links every way back must be an edge itself.",
    )


# --- model ---------------------------------------------------------------------------------------


class ReadoutSpec(Section):
    """Class scores ``Σ_i W^i [p^i; q^i] + c``, summed up a spanning tree to the root."""

    agents: Literal["all"] | list[AgentName] = Field("all", description="Who contributes a term.")
    root: AgentName | None = Field(
        None, description="The agent that holds the labels; default: a centre of the graph."
    )


class LayerGraph(Section):
    """A graph for one layer's K, over the same agents and inside the topology's links."""

    edges: Edges


class ModelSpec(Section):
    """An H2-DNN (semi-implicit Euler, arXiv 2105.13205) and where the graph enters it."""

    graph: Literal["K", "J", "both"] = Field(
        "K", description="K: T = A + I, X = I. J: T = I, R = A + I. both: T = R = A + I."
    )
    layers: Count = Field(8, description="Depth N.")
    h: Positive = Field(0.25, description="Step of the discretisation.")
    activation: Literal["tanh", "relu", "sigmoid"] = Field("tanh", description="σ.")
    layer_graphs: list[LayerGraph | Literal["topology", "none"]] | None = Field(
        None,
        min_length=1,
        description="T per layer, repeated in turn over the depth; default: the topology.",
    )
    train_J: bool = Field(
        False, description="Train X (hence J), which stays the same in every layer."
    )
    encoder: Literal["linear", "pad"] = Field(
        "linear",
        description="linear: [p; q] = E x + e, learnt. pad: x enters p (or q), zeros elsewhere.",
    )
    readout: ReadoutSpec = ReadoutSpec()


# --- data ----------------------------------------------------------------------------------------


class AutoSplit(Section):
    """Equal runs of features in order (raster order in an image)."""

    kind: Literal["auto"] = "auto"
    agents: list[AgentName] | None = Field(None, description="Who sees input; default: everyone.")


class PatchSplit(Section):
    """A grid of rectangular image patches, row by row, one an agent."""

    kind: Literal["patches"]
    grid: tuple[Count, Count] = Field(description="Patches down and across.")
    agents: list[AgentName] | None = Field(None, description="Who sees input; default: everyone.")


class StripeSplit(Section):
    """Horizontal or vertical image stripes, one an agent."""

    kind: Literal["stripes"]
    axis: Literal["rows", "columns"] = "rows"
    agents: list[AgentName] | None = Field(None, description="Who sees input; default: everyone.")


class IndexSplit(Section):
    """Explicit feature indices per agent."""

    kind: Literal["indices"]
    indices: dict[AgentName, list[Annotated[int, Field(ge=0)]]]
    enter: dict[AgentName, Literal["p", "q"]] = Field(
        default_factory=dict,
        description="With encoder pad: the state that an agent's features enter; default p.",
    )


Split = Annotated[
    AutoSplit | PatchSplit | StripeSplit | IndexSplit, Field(discriminator="kind")
]
DataName = Literal["digits", "mnist", "swiss_roll", "double_circles", "double_moons"]


class DataSpec(Section):
    """The data set, and which agent sees which of its features."""

    name: DataName = "digits"
    dir: str | None = Field(
        None, description="Folder of the MNIST files; default: $HDNN_DATA, then the cache."
    )
    split: Split = AutoSplit()
    train_samples: Count | None = Field(None, description="Use only the first so many; all if unset.")
    test_samples: Count | None = Field(None, description="Likewise for the test set.")


# --- training ------------------------------------------------------------------------------------


class SGD(Section):
    """Stochastic gradient descent (torch.optim.SGD)."""

    name: Literal["sgd"]
    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 0.0


class Adam(Section):
    """Adam, weight decay as an L2 gradient (torch.optim.Adam)."""

    name: Literal["adam"] = "adam"
    lr: Positive = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    weight_decay: NonNegative = 0.0


class AdamW(Section):
    """Adam with decoupled weight decay (torch.optim.AdamW)."""

    name: Literal["adamw"]
    lr: Positive = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    weight_decay: NonNegative = 0.01


Optimizer = Annotated[SGD | Adam | AdamW, Field(discriminator="name")]


class Constant(Section):
    """The learning rate stays as it is."""

    name: Literal["constant"] = "constant"


class Step(Section):
    """The learning rate is multiplied by gamma every so many epochs."""

    name: Literal["step"]
    every: Count = Field(description="Epochs between two cuts.")
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1


class Cosine(Section):
    """Half a cosine from lr down to final · lr over the whole run."""

    name: Literal["cosine"]
    final: Annotated[float, Field(ge=0, le=1)] = 0.0


class OneCycle(Section):
    """Cosine up from lr/start to lr for a part of the run, then down to lr/end (Smith 2017)."""

    name: Literal["one-cycle"]
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.3
    start: Annotated[float, Field(ge=1)] = 25.0
    end: Annotated[float, Field(ge=1)] = 1e4


Schedule = Annotated[Constant | Step | Cosine | OneCycle, Field(discriminator="name")]


class TrainingSpec(Section):
    """How the weights are found. All of it is local to an agent but the clipping norm."""

    epochs: Count = 20
    batch_size: Count = 64
    optimizer: Optimizer = Adam()
    schedule: Schedule = Constant()
    clip_norm: Positive | None = Field(
        None, description="Clip the gradient of all agents to this norm, summed over the tree."
    )
    alpha: NonNegative = Field(
        0.0, description="Weight α of the paper's α h/2 Σ_j ‖K_{j+1}-K_j‖² + ‖b_{j+1}-b_j‖²."
    )
    shift: Annotated[int, Field(ge=0)] = Field(
        0, description="Augmentation: each agent's image part moves by up to so many pixels."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    dtype: Literal["float32", "float64"] = "float32"
    eval_every: Count = Field(1, description="Epochs between two evaluations on the test set.")
    checkpoint_every: Count = Field(1, description="Epochs between two checkpoints.")


# --- cluster -------------------------------------------------------------------------------------


class ClusterSpec(Section):
    """How agents become Ray actors."""

    agents_per_actor: Count | Literal["auto"] = Field(
        1, description="Agents that share one actor; auto: one actor a core of the cluster."
    )
    address: str | None = Field(None, description="Ray cluster to join; default: start one here.")
    placement: Literal["spread", "pack"] = Field("pack", description="Over the cluster's nodes.")
    timeout: Positive = Field(
        60.0, description="Seconds after which a message or a placement that does not come fails."
    )
    threads: Count | None = Field(
        None, description="Torch threads an actor; default: the node's cores shared equally."
    )


class Spec(Section):
    """One training job."""

    topology: TopologySpec
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    training: TrainingSpec = TrainingSpec()
    cluster: ClusterSpec = ClusterSpec()
