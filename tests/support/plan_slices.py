"""Meshes over two slices of TPUs that are not there: run by test_plan.py with the sizes of one, of
that for sampling, and a topology. Prints the slices along `data`, or why there is no such mesh.
"""

import json
import sys

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.planning.chips import topology_devices

shape, decode_shape = ([int(n) for n in sizes.split("x")] for sizes in sys.argv[1:3])
devices = topology_devices((sys.argv[3:] or ["v5e:2x2"])[0], slices=2)
try:
    mesh = mesh_lib.make_mesh(shape, devices)
    mesh_lib.reshaped(mesh, decode_shape)
    print(json.dumps([[d.slice_index for d in rows.flat] for rows in mesh.devices]))
except ValueError as error:
    print(json.dumps(str(error)))
