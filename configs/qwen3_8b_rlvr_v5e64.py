"""RLVR on Qwen3-8B with the settings of the paper's baseline, on a v5e-64 (64 chips of 16 GB).

    opsd-jax train --config configs/qwen3_8b_rlvr_v5e64.py --workdir runs/qwen3_8b_rlvr_v5e64 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_rlvr_v5e64.py --topology v5e:8x8

Its plan (2026-11-25, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5e:8x8: 64 x TPU v5 lite
    mesh (data x fsdp x tensor): 1 x 16 x 4; while sampling: 1 x 16 x 4

    HBM of a device, GiB, of 15.75
      rlvr rollouts            11.04   4.71 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 3.81, cache 5.06,
        prompts' cache 0.07, temporaries 0.42
      rlvr step                 5.51   10.24 left
        parameters 0.48, optimizer 0.96, teacher 0.24, temporaries 3.83
      evaluation                7.28   8.47 left
        parameters 0.48, weights for sampling 3.81, cache 2.53, prompts' cache 0.04, temporaries
        0.42

    of a device:                          compile    HBM  temporaries   TFLOP   moved  network
                                                s    GiB          GiB             GiB      GiB
      reshard                                   1   8.10         3.81       0   12.56     3.81
      rlvr rollouts: start                      0   5.06         0.00       0   5.063        0
      rlvr rollouts: prefill                    6   3.69         0.10   7.422   3.625     1.14
      rlvr rollouts: admit to 18432             2   5.31         0.18       0    1.82   0.0469
      rlvr rollouts: decode in 18432           22   9.30         0.42   1.937   361.8    0.288
      rlvr: train step                        336   5.51         3.83    3913    8188      947
      evaluation: start                         1   2.53         0.00       0   2.531        0
      evaluation: prefill                      23   3.63         0.07   3.634   3.373     0.57
      evaluation: admit to 9216                 4   2.67         0.11       0  0.7149   0.0117
      evaluation: decode in 9216               49   6.77         0.42   1.937   307.8    0.288

    roofline, s: at best; with products, memory and network one after the other
      rlvr rollouts             970.8   1001.8
      rlvr step                 317.8    670.8
      evaluation                103.2    107.1
      for responses of 50% of their budget, full prompts, all rows active; bfloat16,
      HBM and one ring of the network at the makers' speed
"""

from opsd_jax import recipes


def get_config():
    """Heads, vocabulary and, between layers, tokens lie over four chips."""
    config = recipes.paper_rlvr("qwen3-8b")
    config.mesh = (1, 16, 4)
    config.model.sequence_parallel = True
    config.rlvr.slots = 128
    return config
