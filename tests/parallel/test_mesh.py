"""The mesh and its rules: what does not go together is refused by name, before it compiles."""

import jax
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
            r"layers/q\[6, 8\]: its dimension of 6 is split over .* 'fsdp' of 4",
        ),
        (
            [(r"layers/q", P(None, "fsdp", "tensor"))],
            r"layers/q\[6, 8\]: its rule .* is for 3 dimensions or more",
        ),
        (
            [(r"layers/q", P("tensor", "tensor"))],
            r"layers/q\[6, 8\]: its rule .* uses a mesh axis twice",
        ),
        (
            [(r"layers/q", P(("tensor", "fsdp"), "fsdp"))],
            r"layers/q\[6, 8\]: its rule .* uses a mesh axis twice",
        ),
        ([(r"layers/q", P("model"))], r"its rule .* names \['model'\]; the mesh has \['data', "),
    ],
)
def test_rules_are_strict(rules, message):
    with pytest.raises(ValueError, match=message):
        mesh_lib.tree_shardings(mesh_lib.make_mesh((1, 4, 2)), rules, LEAF)


def test_the_first_rule_that_matches_decides():
    mesh = mesh_lib.make_mesh((1, 4, 2))
    rules = [(r"layers/q", P("tensor")), (r".*", P())]
    sharding = mesh_lib.tree_shardings(mesh, rules, LEAF)["layers"]["q"]
    assert sharding.spec == P("tensor")
    abstract = mesh_lib.abstract_of(LEAF, {"layers": {"q": sharding}})
    assert mesh_lib.shard_bytes(abstract) == 6 * 8 * 4 // 2
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (4, 2, 1), (4, 1, 2)])
def test_no_layout_is_one_that_the_partitioner_cannot_go_to(
    config, shape, sequence_parallel, capfd
):
    """Where it cannot, it puts the whole of an array on every device, and says so."""
    section = config.model.copy_and_resolve_references()
    section.sequence_parallel = sequence_parallel
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
