"""RLVR on Qwen3-8B with the settings of the paper's baseline, on a v5p-32 (16 chips of 95 GB).

    opsd-jax train --config configs/qwen3_8b_rlvr_v5p32.py --workdir runs/qwen3_8b_rlvr_v5p32 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_rlvr_v5p32.py --topology v5p:2x2x4

Its plan (2026-11-25, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5p:2x2x4: 16 x TPU v5
    mesh (data x fsdp x tensor): 1 x 16 x 1; while sampling: 1 x 4 x 4

    HBM of a device, GiB, of 95.74
      rlvr rollouts            51.61   44.13 left
        parameters 1.91, optimizer 3.82, teacher 0.95, weights for sampling 3.81, cache 40.50,
        prompts' cache 0.14, temporaries 0.48
      rlvr step                19.96   75.78 left
        parameters 1.91, optimizer 3.82, teacher 0.95, temporaries 13.28
      evaluation               16.33   79.41 left
        parameters 1.91, weights for sampling 3.81, cache 10.12, prompts' cache 0.04,
        temporaries 0.45

    of a device:                          compile    HBM  temporaries   TFLOP   moved  network
                                                s    GiB          GiB             GiB      GiB
      reshard                                   4   8.25         2.53       0   19.91     4.77
      rlvr rollouts: start                      0  40.50         0.00       0    40.5        0
      rlvr rollouts: prefill                   47   3.89         0.23   14.84   29.29     2.28
      rlvr rollouts: admit to 18432            48  40.87         0.23       0   3.141   0.0469
      rlvr rollouts: decode in 18432          143  44.80         0.48    15.5    1168     2.31
      rlvr: train step                        849  19.96        13.281.565e+043.782e+04      489
      evaluation: start                         0  10.13         0.00       0   10.13        0
      evaluation: prefill                       8   3.61         0.05   3.634    9.17     0.57
      evaluation: admit to 9216                 7  10.36         0.20       0    1.02   0.0117
      evaluation: decode in 9216               23  14.39         0.45    7.75   480.2     1.15

    roofline, s: at best; with products, memory and network one after the other
      rlvr rollouts             464.5    521.1
      rlvr step                 545.6    862.0
      evaluation                 47.8     54.9
      for responses of 50% of their budget, full prompts, all rows active; bfloat16,
      HBM and one ring of the network at the makers' speed
"""

from opsd_jax import recipes


def get_config():
    """Weights are cut over four chips while sampling."""
    config = recipes.paper_rlvr("qwen3-8b")
    config.decode_mesh = (1, 4, 4)
    return config
