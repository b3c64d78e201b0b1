"""Mixtral in and out: weights bit by bit, logits under every layout, and what its load-balancing loss means."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file, save_file
from test_router import TOP_K, hidden_states, is_padding, make_router
from tiny_vlm import TINY
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megavlm.batch import Batch
from megavlm.checkpoint import load_checkpoint
from megavlm.checkpoint.weights import CheckpointWeights
from megavlm.config import load_recipe
from megavlm.convert.config_of import architecture_of
from megavlm.convert.folder import convert_folder
from megavlm.convert.mixtral import weight_map
from megavlm.convert.parts import ModelFile, ModelParts
from megavlm.convert.receipt import make_receipt
from megavlm.engines import MegatronEngine, MegatronEngineConfig
from megavlm.models.config import VLMConfig
from megavlm.models.language import LanguageConfig
from megavlm.models.vlm import VLM
from megavlm.runtime.seed import set_seed

VOCAB_SIZE, ROWS, LENGTH, EXPERTS = 50, 2, 12, 4
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2_SP),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "ep2": (2, EP2),
    "tp2_ep2": (2, {**TP2_SP, **EP2, "expert_tensor_parallel_size": 1}),
}


def make(**changes: Any) -> MixtralForCausalLM:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    fields = {**sizes, **heads, "num_local_experts": EXPERTS, "initializer_range": 0.2, "router_aux_loss_coef": 0.02}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**{**fields, **changes}, attn_implementation="eager")).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def make_tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE - 1, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def our_logits(checkpoint: Path, language: dict[str, Any], engine_config: dict[str, Any], tokens: Tensor) -> Tensor:
    """On ranks: ``[N, S, V]``, the language model inside a whole one."""
    engine = MegatronEngine(MegatronEngineConfig(**engine_config))
    engine.start()
    set_seed(1)
    model = VLMConfig.model_validate({**TINY, "language": language})
    settings = engine.config.megatron_settings()
    chunks = [
        VLM(
            model,
            settings,
            vocab_size=VOCAB_SIZE,
            image_token_id=VOCAB_SIZE - 1,
            pre_process=stage.pre_process,
            post_process=stage.post_process,
        )
        for stage in engine.stages()
    ]
    engine.wrap(chunks, training=False)
    load_checkpoint(checkpoint, engine, with_optimizer=False, allow_missing_parts=("vision", "connector"))
    shape = tokens.shape
    batch = Batch(
        tokens=tokens,
        labels=torch.zeros_like(tokens),
        loss_mask=torch.zeros(shape),
        position_ids=torch.arange(LENGTH).expand(ROWS, -1).contiguous(),
        cu_seqlens=torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32),
        tiles=torch.zeros(0, 3, 28, 28, dtype=torch.uint8),
        tiles_per_image=torch.zeros(0, dtype=torch.int64),
        visible_tiles=torch.zeros(*shape, 2, dtype=torch.int64),
    )
    return engine.logits(batch, torch.ones_like(tokens), VOCAB_SIZE).view(*shape, VOCAB_SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf``, ``run`` made of it, and ``back`` made of that."""
    path = tmp_path_factory.mktemp("mixtral")
    make().save_pretrained(path / "hf", max_shard_size="60KB")
    convert_folder(path / "hf", path / "run")
    convert_folder(path / "run", path / "back")
    return path


def language_of(run: Path) -> LanguageConfig:
    language = load_recipe(run / "model.yaml", (), ModelFile).model.language
    assert language is not None
    return language


def difference_to_transformers(run: Path, model: MixtralForCausalLM, layout: str, precision: str) -> float:
    """Largest difference of logits on any rank, relative to the largest logit."""
    world_size, engine = LAYOUTS[layout]
    tokens = make_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
    arguments = (run / "release", language_of(run).model_dump(), {**engine, "precision": precision}, tokens)
    answers = run_ranks(our_logits, world_size, *arguments)
    return max(float((logits - expected).abs().max() / expected.abs().max()) for logits in answers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(folder: Path, layout: str) -> None:
    # Worst seen: 1.5e-6.
    assert difference_to_transformers(folder / "run", make(), layout, "fp32") < 1e-5


@pytest.mark.parametrize("layout", ["one", "tp2_ep2"])
def test_logits_equal_transformers_in_bf16(layout: str, tmp_path: Path) -> None:
    """All experts are chosen: where some are, rounding sends a token to others now and then."""
    model = make(num_experts_per_tok=EXPERTS)
    model.save_pretrained(tmp_path / "hf")
    convert_folder(tmp_path / "hf", tmp_path / "run")
    # Worst seen: 0.056 (weights are large, so that every part counts; a wrong layout gives about 1).
    assert difference_to_transformers(tmp_path / "run", model, layout, "bf16") < 0.12


def test_there_and_back_is_bit_equal(folder: Path) -> None:
    published, back = tensors_of(folder / "hf"), tensors_of(folder / "back")
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in published
    assert_same(back, published)
    loaded, info = MixtralForCausalLM.from_pretrained(folder / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(dict(loaded.state_dict()), dict(make().state_dict()))
    before, after = (json.loads((folder / name / "config.json").read_text()) for name in ("hf", "back"))
    for name in ("num_local_experts", "num_experts_per_tok", "intermediate_size", "router_aux_loss_coef", "model_type"):
        assert after[name] == before[name], name
    for source, target in (("hf", "run"), ("run", "back")):
        receipt = make_receipt(folder / source, folder / target)
        assert receipt.outputs
        assert not receipt.faults


def test_tensors_as_in_memory_are_read_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    state = {name: tensor.clone() for name, tensor in make().state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert_folder(tmp_path / "hf", tmp_path / "run")
    found, expected = (CheckpointWeights(where / "run" / "release") for where in (tmp_path, folder))
    assert_same(dict(found), dict(expected))


def test_the_coefficient_is_multiplied_by_k_and_back(folder: Path) -> None:
    moe = language_of(folder / "run").moe
    assert moe is not None
    assert (moe.num_moe_experts, moe.moe_router_topk, moe.moe_layer_freq) == (EXPERTS, 2, 1)
    assert moe.moe_aux_loss_coeff == pytest.approx(0.04)
    assert not moe.moe_router_pre_softmax


def balance_per_token(padding: Tensor) -> tuple[float, Tensor]:
    """On one rank: our load-balancing loss of a layer, and the logits ``[S, N, E]`` that it is of."""
    router = make_router({}, {"moe_aux_loss_coeff": 1.0})
    router(hidden_states(), padding)
    assert router.last is not None
    num_tokens = int((~padding).sum())
    return router.last.load_balancing_loss.item() / num_tokens, (hidden_states() @ router.weight.T).detach()


@pytest.mark.parametrize("kind", ["none", "one_row"])
def test_their_loss_of_a_layer_is_k_times_ours(kind: str) -> None:
    padding = is_padding(kind)
    [(ours, logits)] = run_ranks(balance_per_token, 1, padding)
    mask = None if kind == "none" else (~padding).T.int()
    flat = logits.transpose(0, 1).flatten(0, 1)
    theirs = load_balancing_loss_func((flat,), logits.shape[-1], TOP_K, mask)
    # Worst seen: 1.7e-7 relative.
    assert float(theirs) == pytest.approx(TOP_K * ours, rel=1e-5)


def test_recipes_may_train_otherwise_but_not_be_another_model(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    convert_folder(folder / "hf", run, ["model.language.moe.moe_aux_loss_coeff=0.5"])
    moe = language_of(run).moe
    assert moe is not None
    assert moe.moe_aux_loss_coeff == 0.5
    with pytest.raises(ValueError, match=r"moe\.moe_router_topk=3, and config\.json says 2"):
        convert_folder(folder / "hf", tmp_path / "other", ["model.language.moe.moe_router_topk=3"])
    with pytest.raises(ValueError, match=r"model\.language\.moe\.num_moe_experts=8, and config\.json says 4"):
        convert_folder(folder / "hf", tmp_path / "other", ["model.language.moe.num_moe_experts=8"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1 \(supported: 0\.0\)"),
        ({"num_experts_per_tok": 1}, r"num_experts_per_tok=1 \(of num_local_experts=4"),
        ({"sliding_window": 8, "max_position_embeddings": 64}, r"sliding_window=8 \(below max_position_embeddings=64"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' \(supported: 'silu'\)"),
        ({"num_local_experts": 5}, r"mlp\.router\.weight has shape \(4, 32\), and the model's has \(5, 32\)"),
        ({"num_local_experts": 3}, r"mlp\.router\.weight has shape \(4, 32\), and the model's has \(3, 32\)"),
    ],
)
def test_other_mixtrals_are_refused(folder: Path, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tree = json.loads((folder / "hf" / "config.json").read_text())
    (tmp_path / "hf").mkdir()
    for file in (folder / "hf").iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(tree | changes))
    with pytest.raises(ValueError, match=message):
        convert_folder(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


OTHERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "dense_layers": (lambda tree: tree["moe"].update(moe_layer_freq=[0, 1]), r"moe_layer_freq=\[0, 1\] \(1 dense"),
    "pre_softmax": (lambda tree: tree["moe"].update(moe_router_pre_softmax=True), r"moe_router_pre_softmax=True"),
    "capacity": (lambda tree: tree["moe"].update(moe_expert_capacity_factor=1.5), r"moe_expert_capacity_factor=1\.5"),
    "qkv_bias": (lambda tree: tree.update(add_qkv_bias=True), r"model\.language\.add_qkv_bias=True \(only False\)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_mixtral_cannot_carry_is_named(folder: Path, name: str) -> None:
    change, message = OTHERS[name]
    tree = language_of(folder / "run").model_dump()
    change(tree)
    parts = ModelParts(language=LanguageConfig.model_validate(tree))
    with pytest.raises(ValueError, match=message):
        architecture_of(parts)
    with pytest.raises(ValueError, match=message):
        weight_map(LanguageConfig.model_validate(tree))


def test_a_whole_model_with_experts_has_no_class(folder: Path) -> None:
    model = VLMConfig.model_validate({**TINY, "language": language_of(folder / "run").model_dump()})
    with pytest.raises(ValueError, match=r"a whole model with .*num_moe_experts=4\. .* --part language"):
        architecture_of(ModelParts.of(model))


def test_narrow_experts_go_out_with_their_own_width(folder: Path, tmp_path: Path) -> None:
    """Not with that of dense layers, of which there is none."""
    overrides = ["model.language.moe.moe_ffn_hidden_size=48", "model.language.ffn_hidden_size=999"]
    convert_folder(folder / "run", tmp_path / "hf", overrides)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["intermediate_size"] == 48
