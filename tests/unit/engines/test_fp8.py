"""What FP8 asks of recipes, shapes, padding and chips."""

from dataclasses import dataclass
from typing import Any

import pydantic
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.engines import MegatronEngineConfig, fp8
from megavlm.engines.fp8 import Fp8Config, check_sides, chip_problem, padding_share, recipes_of, version_numbers


@dataclass(frozen=True)
class Side:
    part: str
    name: str
    size: int


ADA, HOPPER, BLACKWELL, RTX_50 = (8, 9), (9, 0), (10, 0), (12, 0)
ON = {"backend": "transformer_engine", "precision": "fp8"}


def engine(**fields: Any) -> MegatronEngineConfig:
    return MegatronEngineConfig(**{**ON, **fields})


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_settings_are_fields_that_megatron_core_has(recipe: str) -> None:
    settings = {**engine(fp8={"recipe": recipe}).megatron_settings(), "apply_rope_fusion": False}  # needs the package
    config = TransformerConfig(
        **settings, num_layers=2, hidden_size=16, num_attention_heads=2, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False,
    )  # fmt: skip
    assert (config.fp8, config.fp8_recipe, config.bf16, config.params_dtype) == ("hybrid", recipe, True, torch.bfloat16)
    assert "fp8" not in engine(precision="bf16").megatron_settings()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "torch"}, r"engine\.precision='fp8': engine\.backend='torch' has no FP8.*or to fp8_emulation"),
        (
            {"backend": "fp8_emulation", "precision": "bf16"},
            r"engine\.backend='fp8_emulation': there is nothing to emulate in engine\.precision='bf16'\. Set precision",
        ),
        (
            {"fp8": {"language": "bf16", "experts": "fp8", "vision": "fp8"}},
            r"engine\.fp8\.experts='fp8': it is inside the decoder's layers.*language='bf16'",
        ),
        ({"fp8": {"language": "bf16"}}, r"engine\.fp8: every part is bf16\. Set engine\.precision=bf16"),
        (
            {"fp8": {"recipe": "delayed", "num_layers_at_end_in_bf16": 2}},
            r"engine\.fp8\.num_layers_at_start_in_bf16=0 and num_layers_at_end_in_bf16=2: recipe='delayed'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        engine(**fields)


def test_emulation_keeps_the_settings_and_shapes_of_the_recipe() -> None:
    emulated, real = engine(backend="fp8_emulation"), engine()
    assert emulated.pad_multiple == real.pad_multiple
    fields = Fp8Config().megatron_fields()
    assert fields.items() <= emulated.megatron_settings().items()
    assert emulated.megatron_settings()["gradient_accumulation_fusion"] is False
    assert emulated.on_any_machine().backend == "torch"


class Scaled(torch.nn.Module):
    """A layer in the engine's contract of one that emulates."""

    def __init__(self, *amaxes: float) -> None:
        super().__init__()
        self.own, self.told, self.is_on = torch.tensor(amaxes), None, True

    def amaxes(self) -> torch.Tensor:
        return self.own

    def update_scales(self, amaxes: torch.Tensor) -> None:
        self.told = amaxes

    def switch_off(self) -> None:
        self.is_on = False


def test_scales_are_agreed_on_in_one_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanged = []

    def all_reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
        exchanged.append((tensor.tolist(), op, group))
        tensor.mul_(2.0)

    monkeypatch.setattr(fp8.torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(fp8.parallel_state, "get_amax_reduction_group", lambda: "tp and dp")
    layers = [Scaled(1.0, 2.0, 3.0), Scaled(), Scaled(4.0, 5.0, 6.0)]
    found = fp8.emulating_layers([torch.nn.Sequential(torch.nn.Linear(1, 1), *layers)])
    assert found == layers
    fp8.update_scales(found, torch.device("cpu"))
    assert exchanged == [([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], torch.distributed.ReduceOp.MAX, "tp and dp")]
    assert [None if layer.told is None else layer.told.tolist() for layer in layers] == [
        [2.0, 4.0, 6.0],
        None,
        [8.0, 10.0, 12.0],
    ]
    fp8.update_scales([Scaled()], torch.device("cpu"))
    assert len(exchanged) == 1, "nothing depends on steps"
    fp8.switch_off([torch.nn.Sequential(*layers)])
    assert not any(layer.is_on for layer in layers)


def test_parts_inside_the_decoder_follow_it() -> None:
    config = Fp8Config(language="bf16", connector="fp8")
    assert config.fp8_parts == ("connector",)
    assert config.bf16_parts == ("vision", "language", "cross_attention", "experts")
    # else layers outside the decoder would go on with the quantised weights of the first step
    assert config.megatron_fields()["disable_parameter_transpose_cache"] is True
    assert Fp8Config().megatron_fields()["disable_parameter_transpose_cache"] is False
    assert Fp8Config(experts="bf16").bf16_parts == ("vision", "connector", "experts")
    assert engine(precision="bf16", fp8={"experts": "bf16"}).bf16_parts == ()


@pytest.mark.parametrize(
    ("fields", "multiple"),
    [
        ({}, 16),
        ({"fp8": {"recipe": "mxfp8"}}, 32),
        ({"tensor_model_parallel_size": 8}, 16),  # whole rows on each rank
        ({"tensor_model_parallel_size": 8, "sequence_parallel": True}, 128),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True, "fp8": {"recipe": "mxfp8"}}, 128),
        ({"precision": "bf16", "tensor_model_parallel_size": 4, "sequence_parallel": True}, 4),
        ({"fp8": {"language": "bf16", "connector": "fp8"}}, 1),
    ],
)
def test_rows_are_padded_to_what_each_rank_can_quantise(fields: dict[str, Any], multiple: int) -> None:
    config = engine(**fields)
    assert config.pad_multiple == multiple
    splits = config.tensor_model_parallel_size if config.sequence_parallel else 1
    if config.active_fp8 is not None and config.active_fp8.language == "fp8":
        assert multiple // splits % config.active_fp8.alignment == 0


def test_share_that_padding_wastes() -> None:
    assert padding_share([16, 32], 16) == 0.0
    assert padding_share([17, 15], 16) == pytest.approx(16 / 48)
    assert padding_share([], 16) == 0.0


def test_illegal_sides_are_all_named_with_their_numbers() -> None:
    sides = [Side("language", "model.language.hidden_size", 72), Side("language", "width of the queries", 64)]
    sides += [Side("vision", "vectors of a tile in model.vision", 1025)]
    message = (
        r"recipe=tensorwise: each of these must be a multiple of 16:\n  model\.language\.hidden_size is 72 on a rank"
    )
    with pytest.raises(ValueError, match=message) as error:
        check_sides(Fp8Config(), sides)
    assert "1025" not in str(error.value), "the vision encoder is bf16"
    assert "queries" not in str(error.value)
    with pytest.raises(
        ValueError, match=r"vectors of a tile in model\.vision is 1025 on a rank \(engine\.fp8\.vision=fp8"
    ):
        check_sides(Fp8Config(vision="fp8"), sides)
    with pytest.raises(ValueError, match=r"a multiple of 32:\n  side is 48"):
        check_sides(Fp8Config(recipe="mxfp8"), [Side("language", "side", 48)])
    check_sides(Fp8Config(), [Side("language", "side", 48)])


def test_recipes_of_chips() -> None:
    assert recipes_of((8, 0), (13, 0)) == []
    assert recipes_of(ADA, (13, 0)) == ["delayed", "tensorwise"]
    assert recipes_of(HOPPER, (13, 0)) == ["delayed", "tensorwise", "blockwise"]
    assert recipes_of(HOPPER, (12, 8)) == ["delayed", "tensorwise"]
    assert recipes_of(BLACKWELL, (13, 0)) == ["delayed", "tensorwise", "blockwise", "mxfp8"]
    assert "mxfp8" not in recipes_of(RTX_50, (13, 0))
    assert chip_problem("mxfp8", HOPPER, (13, 0)) == (
        "has compute capability 9.0, and mxfp8 runs on Blackwell of data centres (B200, GB200)"
    )
    assert chip_problem("blockwise", HOPPER, (12, 8)) == "is used with CUDA 12.8, and blockwise needs 12.9"


def as_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], transformer_engine: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(fp8.importlib.metadata, "version", lambda name: transformer_engine)


def missing_package(name: str) -> str:
    raise fp8.importlib.metadata.PackageNotFoundError(name)


def test_a_machine_that_cannot_is_told_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"engine\.fp8\.recipe=tensorwise: there is no CUDA GPU here\. Set .*backend=fp8_emulation"
    ):
        fp8.check_machine(Fp8Config())
    as_gpu(monkeypatch, HOPPER, "2.11.0")
    fp8.check_machine(Fp8Config(recipe="blockwise"))
    with pytest.raises(
        ValueError, match=r"recipe=mxfp8: a GPU has .* 9\.0.*Choose one of delayed, tensorwise, blockwise"
    ):
        fp8.check_machine(Fp8Config(recipe="mxfp8"))
    as_gpu(monkeypatch, (8, 0), "2.11.0")
    with pytest.raises(ValueError, match=r"recipe=delayed: .*Set engine\.precision=bf16"):
        fp8.check_machine(Fp8Config(recipe="delayed"))
    monkeypatch.undo()
    as_gpu(monkeypatch, HOPPER, "2.11.0")
    monkeypatch.setattr(fp8.importlib.metadata, "version", missing_package)
    with pytest.raises(ValueError, match=r"Transformer Engine \(none\) is installed, and 2\.9 is needed\. pip install"):
        fp8.check_machine(Fp8Config())
    as_gpu(monkeypatch, HOPPER, "2.8.0")
    with pytest.raises(ValueError, match=r"Transformer Engine 2\.8\.0 is installed, and 2\.9 is needed\. pip install"):
        fp8.check_machine(Fp8Config())


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.11.0+c188b53", (2, 11)), ("13.0", (13, 0)), ("2", (2, 0)), ("2.9.0a0", (2, 9)), ("", (0, 0))],
)
def test_version_numbers(text: str, numbers: tuple[int, int]) -> None:
    assert version_numbers(text) == numbers


def test_fp8_is_switched_off_in_every_config() -> None:
    def config() -> TransformerConfig:
        return TransformerConfig(
            num_layers=1, hidden_size=16, num_attention_heads=2, fp8="hybrid", fp8_recipe="tensorwise"
        )

    outer, inner = torch.nn.Module(), torch.nn.Module()
    outer.config, inner.config = config(), config()
    outer.inner = inner
    fp8.switch_off([outer])
    assert outer.config.fp8 is inner.config.fp8 is None
