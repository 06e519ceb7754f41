"""Names of places."""

import pytest

from care_lens.core import BLOCK_COMPONENTS, Site

NAMES = [
    "vision.hook_embed",
    *(f"vision.blocks.{layer}.{name}" for layer in (0, 11) for name in BLOCK_COMPONENTS),
    "projector.hook_in",
    "projector.hook_out",
    *(f"blocks.{layer}.{name}" for layer in (0, 2, 11) for name in BLOCK_COMPONENTS),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_sites_are_inverse(name):
    site = Site.parse(name)
    assert str(site) == name and Site.parse(site) is site
    assert Site.parse(str(site)) == site and hash(Site.parse(name)) == hash(site)


def test_sites_sort_in_the_order_of_the_forward_pass():
    sites = [Site.parse(name) for name in NAMES]
    assert sorted(reversed(sites)) == sites
    assert Site("language", 2, "hook_mlp_out") > Site("vision", 30, "hook_mlp_out")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks.hook_mlp_out",
        "blocks.x.hook_mlp_out",
        "vision.blocks.1",
        "projector.hook_mid",
        "hook_embed",
    ],
)
def test_what_is_no_site_is_refused(name):
    with pytest.raises(ValueError, match="site"):
        Site.parse(name)


@pytest.mark.parametrize(
    "tower, layer, component, message",
    [
        ("language", None, "hook_mlp_out", "component of the language tower outside the blocks"),
        ("vision", 1, "hook_embed", "component of the vision tower at layer 1"),
        ("projector", 0, "hook_in", "component of the projector tower at layer 0"),
        ("language", -1, "hook_mlp_out", "layer must be 0 or more, got -1"),
    ],
)
def test_what_cannot_be_is_refused(tower, layer, component, message):
    with pytest.raises(ValueError, match=message):
        Site(tower, layer, component)


def test_a_string_in_place_of_a_list_of_sites_is_named_as_such():
    with pytest.raises(ValueError, match="give a list of sites, not a string"):
        [Site.parse(site) for site in "blocks.1.hook_mlp_out"]
