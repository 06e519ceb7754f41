"""Where readers are tried, from hand-made rankings."""

import numpy as np
import pandas as pd

from care_lens.mediation import Localisation, MediationResult
from care_lens.mediation.mediate import PAIR_COLUMNS
from care_lens.mediation.placement import localised, reader_layers


def _ranking(*places):
    """Of (tower, layer, score), the first place first."""
    return Localisation(
        pd.DataFrame(places, columns=pd.Index(["tower", "layer", "score"])).assign(mediator="a place"), {}
    )


def _effects(*, shift):
    """Two places of one block; the MLP carries all of an effect, which is `shift`."""
    rows = []
    for component, share in (("hook_attn_out", 0.0), ("hook_mlp_out", 1.0)):
        for pair in range(4):
            place = ("language", 3, component, None, None, f"blocks.3.{component}", "all", pair, str(pair))
            rows.append((*place, 0.0, shift, share * shift, (1 - share) * shift))
    frame = pd.DataFrame(
        {"effect": ["NIE"], "position": ["all"], "mediator": ["blocks.3.hook_mlp_out"], "value": [1.0]}
    )
    return MediationResult(frame, {"outcome": "margin"}, pd.DataFrame(rows, columns=pd.Index(PAIR_COLUMNS)))


def test_carriers_of_every_pair_set_count_and_the_vision_tower_does_not():
    places = {
        "one": _ranking(("language", 0, 0.9), ("vision", 3, 0.8), ("language", 2, 0.6), ("language", 4, 0.4)),
        "two": _ranking(("vision", 1, 0.9), ("language", 5, 0.3), ("language", 1, 0.2)),
    }
    assert reader_layers(places, 8, score=0.5).layers == (0, 2, 5)
    assert reader_layers(places, 8, score=0.7).layers == (0, 5)


def test_the_last_block_is_stood_for_by_the_one_below():
    assert reader_layers({"one": _ranking(("language", 7, 0.9))}, 8, score=0.5).layers == (6,)
    assert reader_layers({"one": _ranking(("language", 0, 0.9))}, 1, score=0.5).layers == (0,)


def test_without_a_place_every_block_but_the_last_is_tried():
    assert reader_layers({}, 4, score=0.5).layers == (0, 1, 2)
    assert reader_layers({"one": _ranking(("vision", 0, 0.9))}, 4, score=0.5).layers == (0, 1, 2)


def test_pair_sets_without_an_effect_are_left_out(caplog):
    places = localised({"one": _effects(shift=2.0), "none": _effects(shift=0.0)}, n_boot=10, seed=0)
    assert list(places) == ["one"] and "'none' say nothing" in caplog.text
    assert places["one"].top() == ["blocks.3.hook_mlp_out"] and np.allclose(places["one"].frame["score"], [1.0, 0.0])
    assert reader_layers(places, 8, score=0.5).layers == (3,)
