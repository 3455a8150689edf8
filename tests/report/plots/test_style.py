"""Looks of arms, and files of figures: the same in every report, whatever a user's settings are."""

import hashlib
import io

import matplotlib as mpl
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgb

from ecmoe.report import plots
from ecmoe.report.plots import style
from ecmoe.study.plan import sound
from ecmoe.study.table import table
from tests.report.plots.figures import luminance


def test_saved_as_a_picture_it_is_the_same_each_time(runs, tmp_path):
    plot, paths = plots.final_loss(table(runs)), [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        plot.save(path)
    picture = pyplot.imread(paths[0])
    assert "fill: #ffffff" not in plot.svg() and b"Software" not in paths[0].read_bytes()
    assert paths[0].read_bytes() == paths[1].read_bytes() and picture.shape[1] == round(150 * style.WIDTH)


def test_a_figure_that_is_not_saved_whole_leaves_the_old_one(runs, tmp_path, monkeypatch):
    plot, path = plots.final_loss(table(runs)), tmp_path / "a.png"
    plot.save(path)
    before = path.read_bytes()

    def full(figure, to, **_):
        to.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(plot.figure), "savefig", full)
    with pytest.raises(OSError, match="No space left on device, for .*a.png"):
        plot.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_users_matplotlibrc_changes_no_figure(runs):
    """The same bytes, also for what is made while a figure is drawn, such as its ticks."""

    def digest():
        plot, png = plots.final_loss(table(runs)), io.BytesIO()
        plot.figure.savefig(png, format="png", dpi=50)  # as a user saves it
        return hashlib.sha256(plot.svg().encode() + png.getvalue()).hexdigest()

    clean = digest()
    settings = {
        "font.size": "30",
        "text.usetex": "True",
        "axes.prop_cycle": "cycler('color', ['r'])",
        "savefig.dpi": "7",
    }
    for key, value in settings.items():
        with mpl.rc_context():
            mpl.rcParams[key] = value
            assert digest() == clean, key
            assert mpl.rcParams[key] == mpl.rcParams.__class__({key: value})[key]  # theirs is as it was


def test_an_arm_looks_the_same_in_every_figure():
    one, other = (
        plots.looks(["EC-CF2 raw", "Hash modulo"]),
        plots.looks(["Dense", "Hash modulo", "EC-CF2 raw, pool 512", "EC-CF2 raw"]),
    )
    assert one["EC-CF2 raw"] == other["EC-CF2 raw"] and one["Hash modulo"] == other["Hash modulo"]
    crowd = [f"A{i}" for i in range(9)]  # which leave its colour to an arm that has one
    assert all(plots.looks([*crowd, name])[name][:2] == known for name, known in style._KNOWN.items())
    gates = plots.looks(["EC-CF2 renormalized", "EC-CF2 raw", "EC-CF2 scaled"])
    assert len({look.color for look in gates.values()}) == 1 and len({look.dashes for look in gates.values()}) == 3


def test_an_arm_of_page_05_looks_the_same_alone_among_all_and_among_those_that_offer_as_many_experts():
    planned = sound("gpu", ["05_other_routers"])[0]
    offered = {one.arms[0]: one.config.row.experts_per_token(one.config.to_dict()) for one in planned}
    single = [arm for arm, experts in offered.items() if experts == 1]
    several = [arm for arm in offered if arm not in single]
    for together in (single, several, list(offered)):
        assert all(plots.looks(together)[arm] == plots.looks([arm])[arm] for arm in together)
    centre = plots.looks(["EC-CF2"])["EC-CF2"].color
    for drawn in (single, several):  # as lines, which have no markers
        assert len({plots.looks([arm])[arm].color for arm in drawn} | {centre}) == len({*drawn, "EC-CF2 renormalized"})
    assert len({look[:2] for look in plots.looks(offered).values()}) == len(offered) == 16


def test_an_arm_of_page_02_looks_the_same_among_all_and_among_those_that_differ_in_their_auxiliary_loss():
    arms = [one.arms[0] for one in sound("gpu", ["02_load_balance"])[0]]
    some = {arm for arm in arms if "auxiliary" in arm or arm in ("EC-CF2 renormalized", "GShard top-2 renormalized")}
    assert len(some) == 6 and all(plots.looks(some)[arm] == plots.looks(arms)[arm] for arm in some)


def test_known_arms_have_the_colours_of_okabe_and_ito():
    blue, sky, green, orange, vermilion, purple = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
    named = {"EC-CF2": blue, "EC": blue, "one EC network": blue, "EC-CF1": green, "EC-CF0.5": sky, "GShard top-2": vermilion,
             "Switch top-1": orange, "Hash modulo": purple, "Dense": style.INK, "one dense network": style.INK}  # fmt: skip
    assert {arm: plots.looks([arm])[arm].color for arm in named} == named
    together = [
        "EC-CF2",
        "EC-CF1.5",
        "EC-CF1",
        "EC-CF0.5",
        "EC-CAP2",
        "EC-CAP3",
        "GShard top-2",
        "Switch top-1",
        "Hash modulo",
        "Dense",
    ]
    shown = plots.looks(together).values()
    assert len({look.color for look in shown}) == len({look.marker for look in shown}) == len(together)
    gates = plots.looks(f"EC-CF2 {gate}" for gate in ("renormalized", "raw", "scaled"))
    assert [look.dashes for look in gates.values()] == ["", (4, 2), (1, 1.5)]  # solid, dashed, dotted
    assert plots.looks(["EC raw, pool 512"])["EC raw, pool 512"].dashes == (4, 2)
    none, *some = map(luminance, style.COUNT_COLORS)
    assert some == sorted(some, reverse=True) and 0.5 < none < 0.7 and len(set(to_rgb(style.COUNT_COLORS[0]))) == 1


def test_the_colours_of_the_centre_are_no_other_arms_even_where_it_is_not_in_the_figure():
    centre = {style._KNOWN[name][0] for name in ("EC-CF2", "GShard top-2", "Switch top-1")}
    alone = [plots.looks([f"A{i}"])[f"A{i}"].color for i in range(40)]
    assert len(centre) == 3 and centre.isdisjoint(alone) and len(set(alone)) == 7


def test_more_arms_than_colours_share_those_of_arms_beside_the_centre():
    centre = ["EC-CF2", "GShard top-2", "Switch top-1"]
    looks = plots.looks([*centre, *(f"A{i}" for i in range(12))])
    assert {looks[arm].color for arm in centre}.isdisjoint(looks[f"A{i}"].color for i in range(12))


def test_no_two_arms_of_a_figure_look_alike_and_all_are_seen_on_black_and_on_white():
    arms = [f"EC-CF2 pool={n}" for n in range(9)] + ["Dense"]
    assert len({look.color for look in plots.looks(arms).values()}) == len(arms)
    assert (
        len({look.color for look in plots.looks(f"{arm}, raw" if "8" in arm else arm for arm in arms).values()}) == 10
    )
    assert len({look[::2] for look in plots.looks(["A", "A raw", "A renormalized"]).values()}) == 3
    for color in {*style._PALETTE, style.GREY, *(color for color, _ in style._KNOWN.values())} - {style.INK}:
        for paper in ("#ffffff", "#16191d"):  # of template/style.css
            light, dark = sorted((luminance(color), luminance(paper)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 1.9, (color, paper)
    assert min(map(luminance, style.COUNT_COLORS)) + 0.05 > 1.9 * (luminance("#16191d") + 0.05)


def test_ink_is_the_one_that_is_read_best():
    inks = {
        "#000000": "#fff",
        "#ffffff": "#000",
        "#ff0000": "#fff",
        "#00ff00": "#000",
        "#0000ff": "#fff",
        "#808080": "#000",
        "#ff8000": "#000",
        "#0080ff": "#fff",
    }
    assert {color: style.on_color(color) for color in inks} == inks
