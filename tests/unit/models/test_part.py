"""Parts of a model and modules in them, by the names of parameters."""

import pytest
import torch

from megavlm.models.part import Trainable, parameters_by_name

ALL = frozenset({"vision", "connector", "language"})


@pytest.mark.parametrize(
    ("pattern", "name", "trains"),
    [
        ("projection", "connector.projection.weight", True),
        ("projection", "connector.projection_norm.weight", False),
        ("projection", "connector.layers.0.projection.weight", False),
        ("layers.*.query_ffn", "connector.layers.11.query_ffn.up.weight", True),
        ("layers.2-10", "connector.layers.10.norm.weight", True),
        ("layers.2-10", "connector.layers.1.norm.weight", False),
        ("layers.2-10", "connector.layers.11.norm.weight", False),
        ("layers.2", "connector.layers.20.norm.weight", False),
        ("layers", "connector.layers.20.norm.weight", True),
        ("mlp.*.weight", "connector.mlp", False),
    ],
)
def test_a_module_is_meant_by_its_words(pattern: str, name: str, trains: bool) -> None:
    trainable = Trainable(ALL, {"connector": [pattern]})
    assert (name in trainable) is trains
    assert (name in Trainable(ALL - {"connector"}, {"connector": [pattern]})) is False
    assert "language.decoder.layers.3.mlp.linear_fc1.weight" in trainable, "other parts train whole"
    assert [trainable.is_whole(part) for part in ("connector", "language", "lora")] == [False, True, False]


class Layer(torch.nn.Linear):
    def __init__(self, number: int) -> None:
        super().__init__(2, 2, bias=False)
        self.layer_number = number


def test_layers_of_a_later_stage_have_their_numbers_in_the_model() -> None:
    chunk = torch.nn.Module()
    chunk.language = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Layer(7), Layer(8)])})
    chunk.connector = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False)])})
    assert [name for name, _ in parameters_by_name(chunk)] == [
        "language.layers.6.weight",
        "language.layers.7.weight",
        "connector.layers.0.weight",
    ]
