import pytest

from iprox.models import flops
from iprox.models.layers import compressible_layers, weight_shape


def test_compression_counts_each_reading_and_factorises_once(tiny):
    model = tiny.model()
    reading = 2 * (100 * flops.forward_flops(model) + 40 * flops.head_flops(model))
    once, twice = (flops.compression_flops(model, 100, 40, passes) for passes in (1, 2))
    assert twice - once == pytest.approx(reading)
    # Without a probe there is nothing but the SVDs, whatever there is to read.
    shapes = [weight_shape(layer) for layer in compressible_layers(model).values()]
    svds = sum(4 * m * n * min(m, n) + 9 * min(m, n) ** 3 for m, n in shapes)
    assert flops.compression_flops(model, 100, 40, 0) == pytest.approx(svds)
    roots = sum((m**3 + n**3) / 3 for m, n in shapes)
    moments = 100 * sum(2 * (m**2 + n**2) for m, n in shapes)
    assert once == pytest.approx(reading + moments + roots + svds)
