"""What is found in each architecture, by name."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from lilliput.anatomy.explore import explore, explore_block
from lilliput.anatomy.miniature import miniature
from lilliput.anatomy.model import Block, Link
from lilliput.anatomy.skeleton import Skeleton

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")


def sites(block: Block) -> dict[str, tuple[str, ...]]:
    return {s.name: s.linears for s in block.sites}


def roles(block: Block) -> dict[str, str]:
    return {x.name: x.role for x in block.linears}


def links(block: Block) -> dict[str, tuple[str, ...]]:
    return {x.producer: x.readers for x in block.links}


def link(block: Block, producer: str) -> Link:
    return next(x for x in block.links if x.producer == producer)


def heads(count: int, size: int, start: int = 0, step: int | None = None, repeat: int = 1) -> list[int]:
    """Rows of `count` heads of `size` rows, `step` apart, each read by `repeat` query heads."""
    step = size if step is None else step
    return [start + h * step + j for h in range(count) for _ in range(repeat) for j in range(size)]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_family(explored: Any, name: str) -> None:
    _, anatomy = explored(name)
    for block in anatomy.blocks:
        assert sites(block) == {
            QKV[0]: QKV,
            "self_attn.o_proj": ("self_attn.o_proj",),
            GATED[0]: GATED,
            "mlp.down_proj": ("mlp.down_proj",),
        }
        assert [s.stage for s in block.sites] == [0, 1, 2, 3]
        assert list(roles(block).values()) == ["q", "k", "v", "o", "gate", "up", "down"]
        assert links(block) == {
            "input_layernorm": QKV,
            "post_attention_layernorm": GATED,
            "self_attn.v_proj": ("self_attn.o_proj",),
            "mlp.up_proj": ("mlp.down_proj",),
        }
        assert link(block, "self_attn.v_proj").index.tolist() == heads(2, 8, repeat=2)
        assert all(x.error <= 1e-5 and x.offset == 0 for x in block.links)
        assert block.groups.count("head") == 2
        assert block.groups.count("channel") == 40
        assert block.residual_readers == (("input_layernorm", QKV), ("post_attention_layernorm", GATED))
        assert block.residual_writers == ("self_attn.o_proj", "mlp.down_proj")
        assert block.notes == ()
    assert len({id(b) for b in anatomy.blocks}) == (2 if name == "qwen2" else 1)  # layer types are kinds


def test_head_and_channel_groups_of_llama(explored: Any) -> None:
    block = explored("llama")[1].blocks[0]
    head = block.groups[1]
    assert head.kind == "head"
    assert set(head.members) == {
        ("self_attn.q_proj", "rows", (16, 32)),
        ("self_attn.k_proj", "rows", (8, 16)),
        ("self_attn.v_proj", "rows", (8, 16)),
        ("self_attn.o_proj", "columns", (16, 32)),
    }
    channel = block.groups[-1]
    assert channel.members == (
        ("mlp.gate_proj", "rows", (39, 40)),
        ("mlp.up_proj", "rows", (39, 40)),
        ("mlp.down_proj", "columns", (39, 40)),
    )
    assert len(block.groups) == len(list(block.groups)) == len(block.groups[:]) == 42
    with pytest.raises(IndexError):
        block.groups[42]


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemma(explored: Any, name: str) -> None:
    _, anatomy = explored(name)
    assert len({id(b) for b in anatomy.blocks}) == 2  # sliding and full attention
    for block in anatomy.blocks:
        assert links(block) == {
            "input_layernorm": QKV,
            "pre_feedforward_layernorm": GATED,
            "self_attn.v_proj": ("self_attn.o_proj",),
            "mlp.up_proj": ("mlp.down_proj",),
        }
        assert link(block, "input_layernorm").offset == 1.0
        assert block.residual_readers == ()
        assert any("cannot be rotated" in note for note in block.notes)  # norms after o and down


def test_phi3_fused(explored: Any) -> None:
    block = explored("phi3")[1].blocks[0]
    assert list(roles(block).values()) == ["qkv", "o", "gate_up", "down"]
    assert link(block, "self_attn.qkv_proj").index.tolist() == heads(2, 8, start=48, repeat=2)
    assert link(block, "mlp.gate_up_proj").index.tolist() == list(range(40, 80))
    assert block.groups[0].members == (
        ("self_attn.qkv_proj", "rows", (0, 16)),
        ("self_attn.qkv_proj", "rows", (32, 40)),
        ("self_attn.qkv_proj", "rows", (48, 56)),
        ("self_attn.o_proj", "columns", (0, 16)),
    )
    assert block.groups[-1].members == (
        ("mlp.gate_up_proj", "rows", (39, 40)),
        ("mlp.gate_up_proj", "rows", (79, 80)),
        ("mlp.down_proj", "columns", (39, 40)),
    )
    assert block.residual_writers == ("self_attn.o_proj", "mlp.down_proj")


def test_gpt2_conv1d(explored: Any) -> None:
    block = explored("gpt2")[1].blocks[0]
    assert roles(block) == {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"}
    assert all(x.transposed and x.bias for x in block.linears)
    assert (block.linear("mlp.c_fc").out_features, block.linear("mlp.c_fc").in_features) == (128, 32)
    assert links(block) == {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",), "attn.c_attn": ("attn.c_proj",)}
    assert link(block, "attn.c_attn").index.tolist() == list(range(64, 96))
    assert block.groups.count("head") == 4
    assert block.residual_readers == ()  # a LayerNorm's mean is not the same after a rotation


def test_opt(explored: Any) -> None:
    block = explored("opt")[1].blocks[0]
    assert list(roles(block).values()) == ["q", "k", "v", "o", "up", "down"]
    assert links(block) == {
        "self_attn_layer_norm": QKV,
        "final_layer_norm": ("fc1",),
        "self_attn.v_proj": ("self_attn.out_proj",),
        "fc1": ("fc2",),  # ReLU lets a positive scale through
    }


def test_opt_with_norms_after(explored: Any) -> None:
    _, anatomy = explored("opt_post_norm")
    block = anatomy.blocks[0]
    assert links(block) == {"self_attn.v_proj": ("self_attn.out_proj",), "fc1": ("fc2",)}
    assert any(note.startswith("self_attn_layer_norm: its output is used by more") for note in block.notes)
    assert anatomy.final == ("model.decoder.project_out.weight",)
    assert "model.decoder.project_in.weight" in anatomy.embeddings


def test_gpt_neox_parallel_and_serial(explored: Any) -> None:
    block = explored("gpt_neox")[1].blocks[0]
    assert {s.name: s.stage for s in block.sites} == {
        "attention.query_key_value": 0,
        "mlp.dense_h_to_4h": 0,
        "attention.dense": 1,
        "mlp.dense_4h_to_h": 1,
    }
    assert link(block, "attention.query_key_value").index.tolist() == heads(4, 8, start=16, step=24)
    serial = explored("gpt_neox_serial")[1].blocks[0]
    assert [s.stage for s in serial.sites] == [0, 1, 2, 3]
    assert links(serial) == links(block)


def test_bloom(explored: Any) -> None:
    block = explored("bloom")[1].blocks[0]
    assert link(block, "self_attention.query_key_value").index.tolist() == heads(4, 8, start=16, step=24)
    assert list(roles(block).values()) == ["qkv", "o", "up", "down"]
    assert block.groups[0].members == (
        ("self_attention.query_key_value", "rows", (0, 24)),
        ("self_attention.dense", "columns", (0, 8)),
    )


def test_falcon_layouts(explored: Any) -> None:
    block = explored("falcon")[1].blocks[0]  # one key-value head; one norm feeds attention and MLP
    assert links(block)["input_layernorm"] == ("self_attention.query_key_value", "mlp.dense_h_to_4h")
    assert link(block, "self_attention.query_key_value").index.tolist() == heads(1, 8, start=40, repeat=4)
    new = explored("falcon_new")[1].blocks[0]
    assert links(new)["ln_attn"] == ("self_attention.query_key_value",)
    assert links(new)["ln_mlp"] == ("mlp.dense_h_to_4h",)
    assert link(new, "self_attention.query_key_value").index.tolist() == heads(2, 8, start=24, step=32, repeat=2)
    old = explored("falcon_alibi")[1].blocks[0]
    assert link(old, "self_attention.query_key_value").index.tolist() == heads(4, 8, start=16, step=24)


@pytest.mark.parametrize(("name", "inner"), [("mixtral", 40), ("qwen3_moe", 20)])
def test_mixture_of_experts(explored: Any, name: str, inner: int) -> None:
    block = explored(name)[1].blocks[0]
    gates = [f"mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up")]
    assert roles(block)["mlp.gate"] == "router"
    assert set(links(block)["post_attention_layernorm"]) == {"mlp.gate", *gates}
    stages = {s.name: s.stage for s in block.sites}
    assert {stages[f"mlp.experts.{e}.gate_proj"] for e in range(4)} == {stages["mlp.gate"] + 1}
    assert {stages[f"mlp.experts.{e}.down_proj"] for e in range(4)} == {stages["mlp.gate"] + 2}
    for e in range(4):
        assert links(block)[f"mlp.experts.{e}.up_proj"] == (f"mlp.experts.{e}.down_proj",)
        assert block.linear(f"mlp.experts.{e}.up_proj").expert == e
        assert sites(block)[f"mlp.experts.{e}.gate_proj"] == tuple(gates[2 * e : 2 * e + 2])
    expert = next(g for g in block.groups if g.kind == "expert")
    assert expert.members == (
        ("mlp.gate", "rows", (0, 1)),
        ("mlp.experts.0.gate_proj", "rows", (0, inner)),
        ("mlp.experts.0.up_proj", "rows", (0, inner)),
        ("mlp.experts.0.down_proj", "columns", (0, inner)),
    )
    assert block.groups.count("channel") == 4 * inner
    assert len(block.residual_writers) == 5


def test_a_gate_of_one_row_is_a_router_and_belongs_to_no_expert(explored: Any) -> None:
    block = explored("qwen2_moe")[1].blocks[0]
    roles = {x.name: x.role for x in block.linears}
    assert roles["mlp.shared_expert_gate"] == "router"
    assert roles["mlp.shared_expert.down_proj"] == "down"
    assert block.groups.count("expert") == 4
    members = {name for group in block.groups if group.kind == "expert" for name, _, _ in group.members}
    assert "mlp.gate" in members
    assert "mlp.shared_expert_gate" not in members


@pytest.mark.parametrize("name", ["gpt_oss", "xglm"])
def test_code_that_knows_no_float64_is_looked_at_in_float32(explored: Any, name: str) -> None:
    block = explored(name)[1].blocks[0]
    assert {"v", "o"} <= {x.role for x in block.linears}
    assert any(x.kind == "linear" for x in block.links)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_deepseek(explored: Any, name: str) -> None:
    _, anatomy = explored(name)
    dense, sparse = anatomy.blocks
    assert roles(dense)["mlp.down_proj"] == "down"
    assert roles(sparse)["mlp.shared_experts.down_proj"] == "down"
    assert sites(sparse)["mlp.gate"] == ("mlp.gate", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    assert links(sparse)["self_attn.q_a_layernorm"] == ("self_attn.q_b_proj",)
    assert links(sparse)["self_attn.kv_a_layernorm"] == ("self_attn.kv_b_proj",)
    assert links(sparse)["input_layernorm"] == ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
    assert link(sparse, "self_attn.kv_b_proj").index.tolist() == heads(4, 8, start=8, step=16)
    assert roles(sparse)["self_attn.kv_b_proj"] == "other"
    assert (sparse.groups.count("head"), sparse.groups.count("expert")) == (4, 4)
    assert len(links(sparse)["post_attention_layernorm"]) == 11
    assert [norm for norm, _ in sparse.residual_readers] == ["input_layernorm", "post_attention_layernorm"]


def test_a_link_moves_a_scale_in_the_real_model(explored: Any) -> None:
    """What the anatomy promises holds in transformers' own model, with its own weights."""
    model, anatomy = explored("llama_tied_bias")
    block = model.model.model.layers[0]
    ids = model.ids()
    before = model.logits(ids)
    kept = {k: v.clone() for k, v in block.state_dict().items()}
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for x in anatomy.blocks[0].links:
            scale = x.tie(torch.rand(len(x.index), generator=rng) + 0.5)
            rows = torch.ones(int(x.index.max()) + 1)
            rows[x.index] = scale
            for reader in x.readers:
                block.get_submodule(reader).weight.mul_(scale)
            producer = block.get_submodule(x.producer)
            producer.weight.div_(rows if x.kind == "norm" else rows[:, None])
            if getattr(producer, "bias", None) is not None:
                producer.bias.div_(rows)
    after = model.logits(ids)
    changed = not torch.equal(block.state_dict()["mlp.up_proj.weight"], kept["mlp.up_proj.weight"])
    block.load_state_dict(kept)
    assert changed
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


WIDE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        tf.LlamaConfig(**WIDE),
        tf.Phi3Config(**WIDE, bos_token_id=1, eos_token_id=2),
        tf.MixtralConfig(**WIDE, num_local_experts=2, num_experts_per_tok=1),
        tf.OPTConfig(vocab_size=64, hidden_size=64, ffn_dim=320, num_hidden_layers=1, num_attention_heads=4),
    ],
    ids=["llama", "phi3", "mixtral", "opt"],
)
def test_a_miniature_tells_the_same_as_the_model(config: Any) -> None:
    skeleton = Skeleton(config)
    assert miniature(skeleton) is not None
    small = explore(skeleton).blocks[0]
    full = explore_block(Skeleton(config), 0, seed=1)
    assert small.linears == full.linears
    assert small.sites == full.sites
    assert list(small.groups) == list(full.groups)
    assert links(small) == links(full)
    assert all(torch.equal(link(small, x.producer).index, x.index) for x in full.links)
    assert small.residual_readers == full.residual_readers


class OddConfig(tf.PretrainedConfig):
    model_type = "lilliput_odd"

    def __init__(self, hidden_size: int = 24, num_hidden_layers: int = 2, vocab_size: int = 64, **rest: Any) -> None:
        super().__init__(**rest)
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size


class OddBlock(nn.Module):
    """No attention, a norm used twice, a product of two sines, and a weight that is neither linear nor norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.left = nn.Linear(width, 16)
        self.right = nn.Linear(width, 16)
        self.back = nn.Linear(16, width)
        self.table = nn.Embedding(3, width)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        x = self.norm(hidden_states)
        y = self.back(torch.sin(self.left(x)) * torch.sin(self.right(x)))
        return hidden_states + y + 0.1 * x + self.table.weight.sum(0)


class OddModel(tf.PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([OddBlock(config.hidden_size) for _ in range(config.num_hidden_layers)])
        self.out = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: Tensor, use_cache: bool = False, **_: Any) -> Any:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return tf.modeling_outputs.CausalLMOutput(logits=self.out(x) * 2)


def test_an_unknown_architecture_gives_what_could_be_verified() -> None:
    tf.AutoConfig.register("lilliput_odd", OddConfig)
    tf.AutoModelForCausalLM.register(OddConfig, OddModel)
    config = OddConfig()
    skeleton = Skeleton(config)
    assert skeleton.block_names == ("blocks.0", "blocks.1")
    assert skeleton.final == ()
    anatomy = explore(skeleton)
    block = anatomy.blocks[0]
    assert sites(block) == {"left": ("left", "right"), "back": ("back",)}
    assert block.links == ()
    assert list(roles(block).values()) == ["other", "other", "other"]
    assert any(note.startswith("norm: its output is used by more than left, right") for note in block.notes)
    assert any(note.startswith("table: holds weights") for note in block.notes)

    torch.manual_seed(0)
    real = OddModel(config).eval()
    ids = torch.randint(0, 64, (2, 5))
    skeleton.load(dict(real.state_dict()))
    with torch.no_grad():
        hidden, calls = skeleton.embed(ids)
        for i in range(2):
            hidden = skeleton.run(i, hidden, calls)
        got = skeleton.logits(skeleton.finish(hidden))
        torch.testing.assert_close(got, real(input_ids=ids).logits)


def test_head_sizes_that_differ_by_block_are_each_blocks_own() -> None:
    config = tf.Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=12, hidden_size_per_layer_input=0, sliding_window=8,
        max_position_embeddings=64, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    if not getattr(config, "is_heterogeneous", False):
        pytest.skip("this transformers keeps one head size")
    anatomy = explore(Skeleton(config))
    assert [block.linear("self_attn.q_proj").out_features for block in anatomy.blocks] == [32, 48]
    assert all(block.groups.count("head") == 2 for block in anatomy.blocks)


@pytest.mark.parametrize("inner", [43, 45])
def test_an_odd_number_of_hidden_channels_is_told_apart(inner: int) -> None:
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
    )
    block = explore(Skeleton(config)).blocks[0]
    assert roles(block)["mlp.up_proj"] == "up"
    assert block.groups.channels[0].width == inner


def test_an_equal_model_is_explored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """How it is stored makes no other model; a shape or a name of the config does."""
    module = sys.modules["lilliput.anatomy.explore"]
    real, seen = module._explore, []

    def counted(skeleton: Skeleton, *rest: Any) -> Any:
        seen.append(skeleton.config.hidden_size)
        return real(skeleton, *rest)

    monkeypatch.setattr(module, "_explore", counted)
    monkeypatch.setattr(module, "_KNOWN", {})

    def config(hidden: int = 32, **more: Any) -> Any:
        return tf.LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            num_hidden_layers=1,
            intermediate_size=48,
            num_attention_heads=2,
            num_key_value_heads=2,
            **more,
        )

    first = explore(Skeleton(config()))
    stored = config(quantization_config={"quant_method": "lilliput"})
    assert explore(Skeleton(stored)) is first
    assert explore(Skeleton(config(64))) is not first
    assert explore(Skeleton(config(attention_bias=True))) is not first
    assert seen == [32, 64, 32]
