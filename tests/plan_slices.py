"""Meshes over slices of TPUs that are not there: run by test_plan.py. Prints the slices."""

import json
import sys

from opsd_jax import plan
from opsd_jax.parallel import mesh as mesh_lib

devices = plan.topology_devices("v5e:2x2", slices=2)
try:
    mesh = mesh_lib.make_mesh([int(n) for n in sys.argv[1].split("x")], devices)
    print(json.dumps([[d.slice_index for d in rows.flat] for rows in mesh.devices]))
except ValueError as error:
    print(json.dumps(str(error)))
