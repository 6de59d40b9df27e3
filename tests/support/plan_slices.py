"""Makes a mesh over two TPU slices without the TPUs, for test_plan.py.

    python plan_slices.py MESH DECODE_MESH [TOPOLOGY]

MESH and DECODE_MESH are DATAxFSDPxTENSOR. Prints the slice indices along `data` as JSON, or the
error message if there is no such mesh.
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
