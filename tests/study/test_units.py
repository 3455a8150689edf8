"""Numbers in words."""

from ecmoe.study.units import Unit, amount, between, counted, span, tolerance


def test_numbers_carry_their_unit_and_no_false_digits():
    assert amount(0.00321, Unit.NATS) == "0.003 nats" and amount(0.00042, Unit.NATS) == "0.0004 nats"
    ends = {0.0005: "0.001 nats", -0.0005: "-0.001 nats", 0.0: "0.000 nats", 9.5: "9.500 nats", 10.0: "10 nats"}
    assert {x: amount(x, Unit.NATS) for x in ends} == ends
    shares = {0.0999: "10.0%", 0.1: "10%", 0.004: "0.4%"}
    assert {x: amount(x, Unit.SHARE) for x in shares} == shares
    said = (tolerance(0.02, Unit.RATIO), tolerance(0.02, Unit.SHARE), tolerance(0.005, Unit.NATS))
    assert said == ("2%", "2.0 points", "0.005 nats")
    assert amount(0.234, Unit.SHARE) == "23%" and amount(0.018, Unit.SHARE, compares=True) == "1.8 points"
    assert amount(1.2, Unit.RATIO) == "1.2 times" and amount(12.345, Unit.NATS) == "12.3 nats"
    assert span(0.21, 0.25, Unit.SHARE) == "21 to 25" and span(-0.0011, 0.0004, Unit.NATS) == "-0.001 to 0.0004"
    assert (counted(1, "seed"), counted(4, "turn")) == ("1 seed", "4 turns")


def test_a_range_has_its_ends_or_one_value_if_they_look_alike():
    assert between([300, 200, 400]) == "200 to 400" and between(iter((400, 400))) == between([400]) == "400"
    assert between([1234.5, 2.0], ",.0f") == "2 to 1,234" and between([51.6, 52.4], ".0f") == "52" and between([]) == ""
