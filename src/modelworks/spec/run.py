"""What a run is: one typed tree of sections that `plan`, `simulate`, `train` and `release` all take.

A section's defaults are those of a small run on this machine. Sections that name a preset are filled in from the
catalog by `spec.files` before they come here, so a `RunSpec` is always complete and depends on nothing else.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from modelworks.spec.fields import Bytes, Count, Duration, Fraction, PositiveFloat, PositiveInt, Section
from modelworks.spec.hardware import ClusterSpec
from modelworks.spec.launch import LaunchSpec
from modelworks.spec.model import ModelSpec
from modelworks.spec.reinforcement import GrpoSpec, RewardsSpec, TasksSpec
from modelworks.spec.rope import RopeScalingSpec
from modelworks.spec.simulation import SimulateSpec

Degree = PositiveInt | Literal["auto"]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NonNegativeInt = Annotated[int, Field(ge=0)]


def _usable_as_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("up to 64 letters, digits, '.', '_' and '-' are accepted, a letter or digit first")
    return name


RunName = Annotated[str, AfterValidator(_usable_as_folder)]
"""A run's name, which names its folder as well."""


class DataSpec(Section):
    """Where text comes from and how it becomes tokens."""

    source: str = "stdlib"
    """`stdlib` (the Python standard library's sources and docs on this machine), `files`, `hf:DATASET`, `dialogues`
    (conversations, of which the assistant's messages are learnt), `pairs` (a chosen and a rejected answer to each
    prompt, for `train.objective = "dpo"`), `tasks` (prompts whose answers can be checked, for `"grpo"`: those of
    `files`, else arithmetic), or `pictures` (conversations about pictures: those of `files`, else about pictures that
    are drawn as they are needed, never one twice)."""
    files: list[str] = []
    """Files, folders and patterns (txt, md, jsonl, parquet; gz and zst), for `source = "files"`; of dialogues, pairs,
    tasks and pictures, jsonl and json."""
    kinds: list[str] = []
    """What is drawn for `source = "pictures"`: kinds of `modelworks data pictures`; all of them if empty."""
    text_field: str = "text"
    """The field of a JSON or Parquet record, or of a dataset, that holds the text."""
    split: str = "train"
    """The split of a Hugging Face dataset."""
    tokenizer: str = "bpe"
    """`bpe` (trained on the text itself, to `model.vocab` pieces), or the path of a `tokenizer.json`."""
    chat_template: str = "auto"
    """How dialogues are written out: `auto` (the template that comes with the tokenizer, else ChatML), or the path of a
    Jinja file."""
    validation_fraction: Fraction = 0.01
    """The share of documents or dialogues held out, chosen by a hash of their text."""
    max_bad_fraction: Fraction = 0.01
    """How many records may be unreadable before the run stops."""
    max_documents: PositiveInt | None = None
    max_bytes: Bytes | None = None
    """Stop reading the source after so many bytes of text."""
    tasks: TasksSpec = TasksSpec()
    """What arithmetic is made up where `source = "tasks"` has no `files`."""

    @model_validator(mode="after")
    def _known_source(self) -> DataSpec:
        known = {"stdlib", "files", "dialogues", "pairs", "tasks", "pictures"}
        if self.source not in known and not self.source.startswith("hf:"):
            raise ValueError(
                f"data.source = {self.source!r} is not accepted: stdlib, files, dialogues, pairs, tasks, pictures or "
                "hf:DATASET is"
            )
        if self.source == "hf:":
            raise ValueError("data.source = 'hf:' names no dataset: hf:DATASET is accepted")
        if self.source in {"files", "dialogues", "pairs"} and not self.files:
            raise ValueError(
                f'data.files is missing: data.source = "{self.source}" needs at least one file, folder or pattern'
            )
        if self.tasks != TasksSpec() and (self.source != "tasks" or self.files):
            beside = "data.files" if self.source == "tasks" else f"data.source = {self.source!r}"
            raise ValueError(
                f"[data.tasks] is not accepted with {beside}: it says what tasks are made up without files"
            )
        return self


Objective = Literal["next-token", "signs", "dpo", "grpo"]


class TrainSpec(Section):
    """How the network is trained."""

    init_from: str | None = None
    """Weights to begin with: a run's name, or the path, with a slash in it, of a run's or a Hugging Face folder; random
    ones if unset. Where they are a dense network's and the model has experts, each of these begins as a copy. The
    network's context and how it is reached may differ too. Unless `data.tokenizer` names the same one, their tokenizer
    is taken."""
    trains: Literal["all", "connector"] = "all"
    """What changes: all weights, or of a network that sees the connector between its tower and its decoder alone."""
    objective: Objective = "next-token"
    """What is minimised: the cross-entropy of each next token, that of the sign in each square of drawn pictures (the
    eyes alone learn, and the head that they are read by), `[dpo]`'s loss on pairs of answers, or `[grpo]`'s on the
    network's own replies to tasks."""
    sign_weight: NonNegativeFloat = 0.0
    """Weight of the loss of `signs` that is added to that of the next token."""
    tokens: Count = 2_000_000
    seq_len: PositiveInt = 512
    global_batch: PositiveInt = 32
    """Sequences per optimizer step; with `grpo`, replies."""
    document_mask: bool = False
    """Whether a token attends to its own document alone where a sequence holds parts of several."""
    restart_positions: bool = False
    """Whether the positions of each document begin at 0, with `document_mask`."""
    micro_batch: Degree = "auto"
    """Sequences per forward pass and process."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """`auto`: bf16 where the device multiplies it faster than fp32, else fp32."""
    compile: bool | Literal["auto"] = "auto"
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the matrices of the blocks and leaves the rest to AdamW."""
    optimizer_state: Literal["fp32", "bf16"] = "fp32"
    """What moments are kept in. `bf16` takes half the memory; they are rounded at random, the same on every layout, and
    weights stay in fp32."""
    learning_rate: PositiveFloat = 1e-3
    """AdamW's peak."""
    tower_learning_rate: PositiveFloat | None = None
    """AdamW's peak for a vision tower; `learning_rate` if unset."""
    matrix_learning_rate: PositiveFloat = 0.02
    """Muon's peak."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """`wsd`: warmup, stable, decay to `final_fraction` over the last `decay_fraction` of the steps."""
    warmup_fraction: Fraction = 0.02
    decay_fraction: Fraction = 0.2
    final_fraction: Fraction = 0.1
    clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0 doesn't clip."""
    load_balance_loss: NonNegativeFloat = 0.01
    """Weight of the experts' load-balancing loss (Switch Transformer, eq. 4)."""
    router_z_loss: NonNegativeFloat = 0.001
    """Weight of the router's z-loss (ST-MoE, eq. 5)."""
    validate_every: NonNegativeInt = 50
    """Steps between validations; 0 validates only at the end."""
    validation_tokens: Count = 65_536
    log_every: PositiveInt = 1
    trace_steps: NonNegativeInt = 0
    """Steps, from the second one after a start on, of which each process writes a Chrome trace into the run's folder
    `traces`."""
    seed: NonNegativeInt = 1337
    max_time: Duration | None = None
    """Stop, as if the tokens were done, after so much time; the schedule then follows time. It is the clock's time from
    the first step on, over all resumptions: validations and checkpoints on the way count, the preparation of the data,
    compilation, the last validation and the release don't."""

    @property
    def learns_signs(self) -> bool:
        """Whether what is written in drawn pictures is a target."""
        return self.objective == "signs" or self.sign_weight > 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step."""
        return self.global_batch * self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps: tokens over tokens per step, rounded up."""
        return -(-self.tokens // self.tokens_per_step)

    @model_validator(mode="after")
    def _masked_positions(self) -> TrainSpec:
        if self.restart_positions and not self.document_mask:
            raise ValueError("train.restart_positions = true is not accepted without train.document_mask = true")
        return self


AdapterTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]


class AdapterSpec(Section):
    """What is trained instead of the network's own weights, which stay as they are."""

    kind: Literal["lora", "dora"] = "lora"
    """`lora`: each target's matrix gets a product of two narrow ones added (Hu et al. 2021, arXiv:2106.09685); `dora`:
    moreover each of its rows a length of its own (Liu et al. 2024, arXiv:2402.09353)."""
    rank: PositiveInt = 16
    """The narrow matrices' width."""
    alpha: PositiveFloat = 32.0
    """The product is multiplied with `alpha / rank`."""
    targets: list[AdapterTarget] = ["q", "k", "v", "o", "gate", "up", "down"]
    """Which of the blocks' linear maps are adapted: attention's four and the feed-forward network's three."""
    dropout: Fraction = 0.0
    """Share of a target's inputs that the narrow matrices don't see, drawn anew in each step."""

    @model_validator(mode="after")
    def _usable(self) -> AdapterSpec:
        if not self.targets:
            raise ValueError("adapter.targets = [] is not accepted: at least one of q, k, v, o, gate, up, down is")
        if self.dropout >= 1.0:
            raise ValueError(f"adapter.dropout = {self.dropout} is not accepted: less than 1 is")
        return self


class DpoSpec(Section):
    """Preference training on pairs of answers (Rafailov et al. 2023, arXiv:2305.18290); the reference is the network
    without its adapter."""

    beta: PositiveFloat = 0.1
    """What the log-ratio of the network to the reference is multiplied with to make a reward: the larger, the closer
    the network stays to the reference."""
    label_smoothing: NonNegativeFloat = 0.0
    """The share of pairs that are taken to be the wrong way round."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answer's cross-entropy per token, which is added (Pang et al. 2024, arXiv:2404.19733)."""

    @model_validator(mode="after")
    def _mostly_right(self) -> DpoSpec:
        if self.label_smoothing >= 0.5:
            raise ValueError(f"dpo.label_smoothing = {self.label_smoothing} is not accepted: less than 0.5 is")
        return self


class StageSpec(Section):
    """A later part of the training, as a run of its own: what it has otherwise than the part before it."""

    name: RunName
    """Ends the name of its run: NAME-STAGE."""
    trains: Literal["all", "connector"] | None = None
    objective: Objective | None = None
    sign_weight: NonNegativeFloat | None = None
    tokens: Count | None = None
    max_time: Duration | None = None
    seq_len: PositiveInt | None = None
    """`model.context` grows to it where it is shorter."""
    global_batch: PositiveInt | None = None
    learning_rate: PositiveFloat | None = None
    tower_learning_rate: PositiveFloat | None = None
    matrix_learning_rate: PositiveFloat | None = None
    document_mask: bool | None = None
    context: PositiveInt | None = None
    rope_base: PositiveFloat | None = None
    rope_scaling: RopeScalingSpec | None = None
    """In place of the one before, as a whole."""
    files: list[str] | None = None
    """Text of its own, as `data.files`."""
    kinds: list[str] | None = None
    """Drawn pictures of its own, as `data.kinds`."""


class ParallelSpec(Section):
    """How a run is laid out; `auto` is the planner's best, and on one process 1 of everything."""

    data: Degree = "auto"
    shard: Degree = "auto"
    """How many data-parallel ranks ZeRO splits state over, repeated over the others (HSDP); `auto` is all of them."""
    tensor: Degree = "auto"
    pipeline: Degree = "auto"
    context: Degree = "auto"
    expert: Degree = "auto"
    expert_tensor: Degree = "auto"
    """Tensor parallelism inside an expert."""
    virtual_stages: Degree = "auto"
    """Chunks of layers that each pipeline stage holds (Narayanan et al. 2021, section 2.2)."""
    schedule: Literal["auto", "1f1b", "interleaved", "zero-bubble"] = "auto"
    zero_stage: Literal[0, 1, 2, 3, "auto"] = "auto"
    """0: replicated; 1: optimizer state sharded; 2: gradients too; 3: parameters too (FSDP)."""
    sequence_parallel: bool | Literal["auto"] = "auto"
    recompute: Literal["auto", "none", "selective", "projections", "full"] = "auto"
    """What the backward pass computes again: nothing, attention's core, all but attention's projections, all."""
    recompute_share: Fraction | Literal["auto"] = "auto"
    """Share of the layers that `recompute` applies to."""


class CheckpointSpec(Section):
    """When a run's state is saved and how much of it is kept."""

    every: Duration = 300.0
    """Time between checkpoints."""
    every_steps: PositiveInt | None = None
    """Steps between checkpoints, instead of time."""
    keep: PositiveInt = 2
    """How many are kept."""
    asynchronous: bool = True
    """Whether they are written while the next steps are made; the loop then waits for a copy in memory alone."""
    to: str | None = None
    """Where checkpoints are copied as well, in a folder of the run's name: any URL that fsspec knows, such as
    `s3://bucket/runs`."""

    @model_validator(mode="after")
    def _is_url(self) -> CheckpointSpec:
        if self.to is not None and not re.fullmatch(r"[a-z][a-z0-9+.-]*://.+", self.to):
            raise ValueError(f"checkpoint.to = {self.to!r} is not accepted: a URL is, such as s3://bucket/runs")
        return self


class GuardSpec(Section):
    """What a run on its own does about what goes wrong."""

    hang: Duration | Literal["auto"] = "auto"
    """How long a process may give no sign of life, and a step take, before all processes start again from the last
    checkpoint; `auto` is 30 s, 0 for ever. A step may always take ten times as long as the longest of the last ones."""
    on_spike: Literal["stop", "skip", "rollback"] = "stop"
    """What follows a loss or a gradient that is no number, or a loss that is a spike: `stop` ends the run, `skip` drops
    the step's update, `rollback` goes back to a checkpoint and passes over the data since."""
    spike_deviations: NonNegativeFloat = 0.0
    """How far above the median of the last losses a loss is a spike, in standard deviations as reckoned from their
    median absolute deviation; 0: none is, but for one that is no number."""
    spike_window: PositiveInt = 128
    """The number of the last losses that a loss is compared with."""
    spike_limit: PositiveInt = 5
    """So many spikes within `spike_window` steps are dealt with; one more ends the run."""
    rollback_steps: NonNegativeInt = 0
    """How many steps `rollback` goes back at least."""
    agreement_every: NonNegativeInt = 0
    """Steps between comparisons of the weights that several processes hold whole copies of; 0: none."""


class ReleaseSpec(Section):
    """What a finished run is turned into."""

    to: list[Literal["safetensors", "gguf", "peft", "gguf-adapter"]] = []
    """Whole weights for Hugging Face and llama.cpp, an adapter's merged into them; the adapter alone for each."""
    quantize: list[Literal["f32", "f16", "bf16", "q8_0", "q4_k"]] = ["q8_0"]
    """Precisions of the GGUF files."""
    license: str = "Apache-2.0"


class RunSpec(Section):
    """A run: everything that `plan`, `simulate`, `train` and `release` need to know."""

    name: RunName = "run"
    model: ModelSpec
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    adapter: AdapterSpec | None = None
    """Trained instead of the network's weights, which are those of `train.init_from`; without it, all weights are."""
    dpo: DpoSpec = DpoSpec()
    grpo: GrpoSpec = GrpoSpec()
    rewards: RewardsSpec = RewardsSpec()
    """What a reply is worth to `grpo`."""
    stages: list[StageSpec] = []
    """What follows on the training, one part after another, each a run of its own (`spec.stages.chain`)."""
    stage: str = ""
    """The one stage that is meant, by its name: ``--set stage=16k``; all of them if empty."""
    software: str = "auto"
    """The framework that trains: its catalog name, or the path of a TOML file; `auto` is this product's own on a CPU
    and Megatron-Core elsewhere."""
    cluster: ClusterSpec = ClusterSpec(
        name="local", preset="local", device="local", gpus=1, gpus_per_node=1, scale_up_domain=1, pue=1.0
    )
    parallel: ParallelSpec = ParallelSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    guard: GuardSpec = GuardSpec()
    release: ReleaseSpec = ReleaseSpec()
    launch: LaunchSpec = LaunchSpec()
    simulate: SimulateSpec = SimulateSpec()

    @model_validator(mode="after")
    def _divisible(self) -> RunSpec:
        model, moe, train, parallel = self.model, self.model.moe, self.train, self.parallel
        if train.restart_positions and model.attention_temperature_length is not None:
            raise ValueError(
                "train.restart_positions = true is not accepted with model.attention_temperature_length = "
                f"{model.attention_temperature_length}: false is"
            )
        if train.seq_len > model.context:
            raise ValueError(f"train.seq_len = {train.seq_len} is longer than model.context = {model.context}")
        for field, degree, what, size in (
            ("tensor", parallel.tensor, "model.heads", model.heads),
            ("expert", parallel.expert, "model.moe.experts", moe.experts if moe else None),
            ("expert_tensor", parallel.expert_tensor, "model.moe.expert_hidden", moe.expert_hidden if moe else None),
            ("data", parallel.data, "train.global_batch", train.global_batch),
        ):
            if degree == "auto" or degree == 1:
                continue
            if size is None:
                raise ValueError(f"parallel.{field} = {degree} needs {what}, and this model has none")
            if size % degree:
                raise ValueError(f"parallel.{field} = {degree} doesn't divide {what} = {size}")
        tensor, context = parallel.tensor, parallel.context
        if tensor != "auto" and model.latent_attention is None and model.kv_heads % tensor and tensor % model.kv_heads:
            raise ValueError(
                f"parallel.tensor = {tensor} doesn't divide model.kv_heads = {model.kv_heads}, nor is a multiple of it"
            )
        if context != "auto" and context > 1 and train.seq_len % (2 * context):
            raise ValueError(
                f"parallel.context = {context} doesn't divide train.seq_len = {train.seq_len} into two parts for each "
                "rank, which balance a causal mask"
            )
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("stages: each needs a name of its own")
        self._adapts_something()
        if self.data.source == "dialogues" and self.data.tokenizer == "bpe" and self.train.init_from is None:
            raise ValueError(
                "data.source = 'dialogues' needs a model that reads already: train.init_from, or the path of a "
                "tokenizer.json as data.tokenizer"
            )
        self._prefers_something()
        self._is_rewarded()
        self._fits_vision()
        self._fills_stages()
        self._fills_cluster()
        self._fills_global_batch()
        if self.cluster.gpus % self.nodes:
            raise ValueError(f"launch.nodes = {self.nodes} doesn't divide cluster.gpus = {self.cluster.gpus}")
        return self

    @property
    def nodes(self) -> int:
        """Over how many nodes an engine spreads the run."""
        return self.launch.nodes or self.cluster.nodes

    def _adapts_something(self) -> None:
        """Refuse an adapter of random weights or of maps that the network doesn't have, and its release without one."""
        adapter, moe = self.adapter, self.model.moe
        for kind in ("peft", "gguf-adapter"):
            if kind in self.release.to and (adapter is None or (kind == "gguf-adapter" and adapter.kind == "dora")):
                without = "an [adapter]" if adapter is None else "adapter.kind = 'lora': llama.cpp knows no DoRA"
                raise ValueError(f"release.to = {kind!r} is not accepted without {without}; safetensors and gguf are")
        if adapter is None:
            return
        if self.train.init_from is None:
            raise ValueError(
                "[adapter] needs train.init_from: it changes weights that are there, such as an imported model's"
            )
        in_mlp = [target for target in adapter.targets if target in ("gate", "up", "down")]
        if in_mlp and moe is not None and not moe.residual and self.model.dense_layers == 0:
            raise ValueError(
                f"adapter.targets = {in_mlp[0]!r} is not accepted: the network has experts in every layer, which are "
                "not adapted; q, k, v and o are"
            )

    def _prefers_something(self) -> None:
        """Refuse preference training without pairs or an adapter, pairs without it, and its settings where unused."""
        source, prefers = self.data.source, self.train.objective == "dpo"
        if prefers and source != "pairs":
            raise ValueError(f"train.objective = 'dpo' needs data.source = 'pairs', not {source!r}")
        if prefers and self.adapter is None:
            raise ValueError(
                "train.objective = 'dpo' needs an [adapter]: the network without it is the reference, which is then in "
                "memory once"
            )
        if not prefers and source == "pairs":
            raise ValueError("data.source = 'pairs' is not accepted without train.objective = 'dpo'")
        if not prefers and self.dpo != DpoSpec():
            raise ValueError("[dpo] is not accepted without train.objective = 'dpo'")

    def _is_rewarded(self) -> None:
        """Refuse reinforcement without tasks or a network that replies already, what it has no room for, and tasks and
        its settings without it."""
        source, grpo, train = self.data.source, self.grpo, self.train
        if train.objective != "grpo":
            if source == "tasks":
                raise ValueError("data.source = 'tasks' is not accepted without train.objective = 'grpo'")
            for name, unused in (("grpo", grpo == GrpoSpec()), ("rewards", self.rewards == RewardsSpec())):
                if not unused:
                    raise ValueError(f"[{name}] is not accepted without train.objective = 'grpo'")
            return
        if source != "tasks":
            raise ValueError(f"train.objective = 'grpo' needs data.source = 'tasks', not {source!r}")
        if train.init_from is None:
            raise ValueError("train.objective = 'grpo' needs train.init_from: a network that gets some answers right")
        if train.global_batch % grpo.group:
            raise ValueError(f"grpo.group = {grpo.group} doesn't divide train.global_batch = {train.global_batch}")
        if grpo.max_new_tokens >= train.seq_len:
            raise ValueError(
                f"grpo.max_new_tokens = {grpo.max_new_tokens} leaves a prompt no room in train.seq_len = "
                f"{train.seq_len}: less is accepted"
            )
        if grpo.kl and self.adapter is None:
            raise ValueError(
                "grpo.kl is not accepted above 0 without an [adapter]: the network without it is the reference"
            )
        if self.model.vision is not None:
            raise ValueError("train.objective = 'grpo' is not accepted with [model.vision]: a network of text is")

    def _fits_vision(self) -> None:
        """Refuse more images than a sequence holds, and a tensor degree that doesn't split the vision tower."""
        vision, tensor = self.model.vision, self.parallel.tensor
        self._knows_signs()
        if vision is None:
            if self.data.source == "pictures":
                raise ValueError("data.source = 'pictures' needs a network that sees: [model.vision]")
            if self.train.trains != "all":
                raise ValueError(f"train.trains = {self.train.trains!r} is not accepted without [model.vision]: all is")
            return
        if vision.tokens_per_sequence > self.train.seq_len:
            raise ValueError(
                f"model.vision.images = {vision.images} of {vision.tiles} tiles make {vision.tokens_per_sequence} "
                f"tokens, more than train.seq_len = {self.train.seq_len}"
            )
        for field in ("heads", "ffn_hidden"):
            if tensor != "auto" and getattr(vision, field) % tensor:
                raise ValueError(
                    f"parallel.tensor = {tensor} doesn't divide model.vision.{field} = {getattr(vision, field)}"
                )

    def _knows_signs(self) -> None:
        """Refuse to teach signs where it isn't known where they stand."""
        train, vision = self.train, self.model.vision
        if not train.learns_signs:
            return
        whole = train.objective == "signs"
        field = "train.objective = 'signs'" if whole else f"train.sign_weight = {train.sign_weight}"
        if train.sign_weight and train.objective != "next-token":
            raise ValueError(f"train.sign_weight is not accepted with train.objective = {train.objective!r}: 0 is")
        if vision is None or self.data.source != "pictures" or self.data.files:
            raise ValueError(f"{field} needs pictures that are drawn: data.source = 'pictures' without data.files")
        if vision.tiles > 1:
            raise ValueError(f"{field} is not accepted with model.vision.tiles = {vision.tiles}: 1 is")
        if train.trains != "all" or self.adapter is not None:
            raise ValueError(f"{field} is not accepted with train.trains = 'connector' or an [adapter]: the eyes learn")

    def _fills_stages(self) -> None:
        """Refuse a pipeline of more chunks than layers, and a schedule that its chunks don't go with."""
        parallel, layers = self.parallel, self.model.layers
        pipeline, virtual, schedule = parallel.pipeline, parallel.virtual_stages, parallel.schedule
        chunks = (1 if pipeline == "auto" else pipeline) * (1 if virtual == "auto" else virtual)
        if chunks > layers:
            raise ValueError(
                f"parallel.pipeline = {pipeline} with virtual_stages = {virtual} "
                f"needs more layers than model.layers = {layers}"
            )
        if virtual not in ("auto", 1) and schedule not in ("auto", "interleaved"):
            raise ValueError(
                f"parallel.schedule = {schedule!r} takes virtual_stages = 1, not {virtual}: interleaved does"
            )
        if virtual == 1 and schedule == "interleaved":
            raise ValueError("parallel.schedule = 'interleaved' needs virtual_stages of 2 or more, or 'auto'")
        if virtual not in ("auto", 1) and pipeline == 1:
            raise ValueError(f"parallel.virtual_stages = {virtual} needs a pipeline of 2 stages or more")

    def _fills_global_batch(self) -> None:
        """Refuse a micro batch that doesn't divide the sequences of one data-parallel rank."""
        micro_batch, data, global_batch = self.train.micro_batch, self.parallel.data, self.train.global_batch
        if micro_batch == "auto":
            return
        ranks = 1 if data == "auto" else data
        if global_batch % (micro_batch * ranks):
            times = f" times parallel.data = {data}" if ranks > 1 else ""
            raise ValueError(
                f"train.micro_batch = {micro_batch}{times} doesn't divide train.global_batch = {global_batch}"
            )

    def _fills_cluster(self) -> None:
        """Refuse degrees whose product doesn't divide the devices (or isn't equal, where every degree is given)."""
        degrees = {name: getattr(self.parallel, name) for name in ("tensor", "pipeline", "context", "data")}
        product = 1
        for degree in degrees.values():
            product *= 1 if degree == "auto" else degree
        stated = [f"{name} {degree}" for name, degree in degrees.items() if degree != "auto"]
        given = " x ".join(stated) + (f" = {product}" if len(stated) > 1 else "")
        if self.cluster.gpus % product or ("auto" not in degrees.values() and product != self.cluster.gpus):
            raise ValueError(f"parallel: {given} doesn't divide into cluster.gpus = {self.cluster.gpus}")
