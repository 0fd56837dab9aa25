"""Frozen weights: no gradient, no states, the same updates of the rest."""

from ptm.engine.layout import Format, Named, PageMap, make_layout

FMT = Format(weight_bytes=2, is_split=True, is_int8=False)


def test_frozen_weights_have_pages_of_weights_only():
    units = [
        ("root", [Named("e", (512, 64), False, True)]),
        ("a", [Named("w", (256, 256), False, True), Named("lora", (8, 256), False)]),
    ]
    layout = make_layout(units, world=1, ep=1, rank=0)
    assert layout.trained == 8 * 256 and layout.numel == 512 * 64 + 256 * 256 + 8 * 256
    assert [g.is_frozen for g in layout.units[1].groups] == [False, True]
    pages = PageMap(layout.numel, 1 << 20, FMT, trained=layout.trained)
    everything = PageMap(layout.numel, 1 << 20, FMT)
    assert pages.states.num_pages == 1 and pages.grads.num_pages == 1
    assert pages.used_bytes == layout.numel * 2 + layout.trained * 14
    assert everything.used_bytes > 4 * pages.used_bytes
