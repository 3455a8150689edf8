"""Numbers in words."""

from ecmoe.study.units import Unit, amount, between, counted, duration, figure, span, tolerance


def test_numbers_carry_their_unit_and_no_false_digits():
    assert amount(0.00321, Unit.NATS) == "0.003 nats" and amount(0.00042, Unit.NATS) == "0.0004 nats"
    ends = {0.0005: "0.001 nats", -0.0005: "-0.001 nats", 0.0: "0.000 nats", 9.5: "9.500 nats", 10.0: "10.0 nats"}
    ends |= {-0.00006: "-0.0001 nats", -0.00004: "0.0000 nats"}  # never -0
    assert {x: amount(x, Unit.NATS) for x in ends} == ends
    shares = {0.0999: "10.0%", 0.1: "10%", 0.004: "0.4%"}
    assert {x: amount(x, Unit.SHARE) for x in shares} == shares
    said = (tolerance(0.02, Unit.RATIO), tolerance(0.02, Unit.SHARE), tolerance(0.005, Unit.NATS))
    assert said == ("2%", "2.0 points", "0.005 nats")
    assert amount(0.234, Unit.SHARE) == "23%" and amount(0.018, Unit.SHARE, compares=True) == "1.8 points"
    assert amount(1.5, Unit.RATIO) == "1.500 times" and amount(12.345, Unit.NATS) == "12.3 nats"
    # The paper's figures aren't measured: a ratio has the digits that it is given with.
    assert [figure(x, Unit.RATIO) for x in (0.5, 1.2)] == ["0.5 times", "1.2 times"]
    assert figure(0.2, Unit.SHARE, compares=True) == "20 points" and figure(0.03, Unit.SHARE) == "3.0%"
    assert (counted(1, "seed"), counted(4, "turn")) == ("1 seed", "4 turns")


def test_both_ends_of_a_span_have_the_same_number_of_decimals():
    spans = [
        (0.958, 0.98, Unit.RATIO),
        (1.4361, 1.5, Unit.RATIO),
        (-0.00031, 0.0068, Unit.NATS),
        (-0.0011, 0.0004, Unit.NATS),
    ]
    spans += [
        (9.5, 10.25, Unit.NATS),
        (0.049, 0.113, Unit.SHARE),
        (0.21, 0.25, Unit.SHARE),
        (-0.0002, 0.0003, Unit.SHARE),
    ]
    assert [span(*of) for of in spans] == [
        "0.958 to 0.980", "1.436 to 1.500", "-0.0003 to 0.0068", "-0.0011 to 0.0004",
        "9.500 to 10.250", "4.9 to 11.3", "21 to 25", "0.0 to 0.0",
    ]  # fmt: skip


def test_less_than_an_hour_is_told_in_minutes():
    times = {
        1 / 3600: "0.0 minutes",
        0.02: "1.2 minutes",
        0.99: "59.4 minutes",
        1.0: "1.0 hours",
        1234.56: "1,234.6 hours",
    }
    assert {hours: duration(hours) for hours in times} == times


def test_a_range_has_its_ends_or_one_value_if_they_look_alike():
    assert between([300, 200, 400]) == "200 to 400" and between(iter((400, 400))) == between([400]) == "400"
    assert between([1234.5, 2.0], ",.0f") == "2 to 1,234" and between([51.6, 52.4], ".0f") == "52" and between([]) == ""
