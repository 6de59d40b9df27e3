"""The device mesh and its sharding rules: errors that name the leaf, and layouts that compile."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from opsd_jax.models import decoder
from opsd_jax.parallel import mesh as mesh_lib

LEAF = {"layers": {"q": jax.ShapeDtypeStruct((6, 8), "float32")}}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(r"layers", P())], r"no sharding rule matches the parameter layers/q\[6, 8\]"),
        (
            [(r"layers/q", P("fsdp"))],
            r"parameter layers/q\[6, 8\] has a dimension of size 6, .* axis .fsdp. of size 4",
        ),
        (
            [(r"layers/q", P(None, "fsdp", "tensor"))],
            r"layers/q\[6, 8\] has 2 dimensions, but its sharding rule .* has 3 entries",
        ),
        (
            [(r"layers/q", P("tensor", "tensor"))],
            r"layers/q\[6, 8\] has the sharding rule .* which uses a mesh axis twice",
        ),
        (
            [(r"layers/q", P(("tensor", "fsdp"), "fsdp"))],
            r"layers/q\[6, 8\] has the sharding rule .* which uses a mesh axis twice",
        ),
        (
            [(r"layers/q", P("model"))],
            r"with the axes \['model'\], .* expected axes from \['data', ",
        ),
    ],
)
def test_a_rule_that_does_not_fit_a_parameter_is_an_error(rules, message):
    with pytest.raises(ValueError, match=message):
        mesh_lib.tree_shardings(mesh_lib.make_mesh((1, 4, 2)), rules, LEAF)


def test_the_first_matching_rule_applies():
    mesh = mesh_lib.make_mesh((1, 4, 2))
    rules = [(r"layers/q", P("tensor")), (r".*", P())]
    sharding = mesh_lib.tree_shardings(mesh, rules, LEAF)["layers"]["q"]
    assert sharding.spec == P("tensor")
    abstract = mesh_lib.abstract_of(LEAF, {"layers": {"q": sharding}})
    assert mesh_lib.shard_bytes(abstract) == 6 * 8 * 4 // 2
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_parameters_of_the_decoder_take_their_rules_and_an_unknown_one_is_an_error(model, params):
    mesh = mesh_lib.make_mesh((2, 2, 2))
    shardings = mesh_lib.tree_shardings(mesh, model.rules, params)
    assert shardings["layers"]["gate"].spec == P(None, "fsdp", "tensor")
    assert shardings["layers"]["attention_norm"].spec == P()
    assert shardings["norm"].spec == P()
    with pytest.raises(ValueError, match=r"no sharding rule matches the parameter extra/w\[3\]"):
        mesh_lib.tree_shardings(mesh, model.rules, {"extra": {"w": np.zeros(3)}})
    with pytest.raises(ValueError, match=r"embedding\[31, 16\].*size 31.*'tensor' of size 2"):
        mesh_lib.tree_shardings(mesh, model.rules, {"embedding": np.zeros((31, 16))})


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 2), (-1, -1, 1), (0, 1, 8), (-1, 3, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(shape):
    with pytest.raises(ValueError, match="mesh"):
        mesh_lib.make_mesh(shape)


def test_minus_one_takes_the_remaining_devices():
    assert dict(mesh_lib.make_mesh((-1, 2, 1)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}


def test_a_batch_is_split_over_data_and_the_results_are_summed():
    """Specs leave out `data` within, and keep dimensions that they do not constrain."""
    batch = {"count": np.int32(3), "rows": np.arange(32.0, dtype=np.float32).reshape(1, 8, 4)}
    seen = []

    def total(weight, batch):
        seen.append(batch["rows"].shape)
        rows = mesh_lib.constrain(batch["rows"][0], P(mesh_lib.ROWS))
        rows = mesh_lib.constrain(rows, P(P.UNCONSTRAINED, "tensor"))
        double = mesh_lib.on_each_device(lambda x: 2 * x, P(mesh_lib.ROWS), P(mesh_lib.ROWS))
        return (weight * double(rows)).sum(), batch["count"] * rows.shape[0]

    for shape, rows in [((2, 2, 2), 4), ((1, 4, 2), 8), ((8, 1, 1), 1)]:
        with jax.set_mesh(mesh_lib.make_mesh(shape)):
            got = jax.jit(mesh_lib.over_data(total, batch))(np.float32(0.5), batch)
        assert seen.pop() == (1, rows, 4)
        assert [float(x) for x in got] == [batch["rows"].sum(), 3 * 8]


@pytest.mark.parametrize("option", ["", "sequence_parallel", "context_parallel"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (4, 2, 1), (4, 1, 2)])
def test_the_partitioner_can_reshard_every_layout(config, shape, option, capfd):
    """If it cannot, it replicates an array on all devices, and XLA prints a warning."""
    section = config.model.copy_and_resolve_references()
    if option:
        section.update({option: True, "remat": "full"})
    mesh, model = mesh_lib.make_mesh(shape), decoder.from_config(section)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = mesh_lib.abstract_of(shapes, mesh_lib.tree_shardings(mesh, model.rules, shapes))
    tokens = jax.ShapeDtypeStruct((16, 24), "int32", sharding=mesh_lib.rows(mesh))

    def loss(params, tokens, positions):
        return (model.policy.forward(params, tokens, positions)[0] ** 2).sum()

    where = jax.tree.map(lambda leaf: leaf.sharding, params)
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss), out_shardings=where).lower(params, tokens, tokens).compile()
    assert "rematerialization" not in capfd.readouterr().err
