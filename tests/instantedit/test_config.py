import pytest

from jaxlab.instantedit import EditConfig, InversionConfig


def test_defaults_are_the_codes():
    assert InversionConfig() == InversionConfig(4, "exact", 0.4, 100, 200)
    assert EditConfig() == EditConfig(1.1, 3.0, 0.4, 0.4, "clean")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: InversionConfig(num_steps=0), "num_steps.*0"),
        (lambda: InversionConfig(num_steps=2.5), "num_steps: expected a whole number, got 2.5"),
        (lambda: InversionConfig(num_steps=True), "num_steps: expected a whole number, got True"),
        (lambda: EditConfig(cfg="strong"), "cfg: expected a finite number, got 'strong'"),
        (lambda: EditConfig(mask_threshold=None), "mask_threshold: expected a number of at least 0, got None"),
        (lambda: InversionConfig(mode="newest"), "mode.*newest"),
        (lambda: InversionConfig(control_scale=-1), "control_scale.*-1"),
        (lambda: InversionConfig(canny_low=-1), "canny_low.*-1"),
        (lambda: EditConfig(mask_threshold=-0.1), "mask_threshold.*-0.1"),
        (lambda: EditConfig(control_scale=float("nan")), "control_scale.*nan"),
        (lambda: EditConfig(dpg=float("inf")), "dpg.*inf"),
        (lambda: EditConfig(compat="newest"), "compat.*newest"),
    ],
)
def test_bad_values(unchecked, make, told):
    with pytest.raises(ValueError, match=told):
        make()
