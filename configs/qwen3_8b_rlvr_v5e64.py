"""RLVR on Qwen3-8B with the settings of the paper's baseline, on a v5e-64 (64 chips of 16 GB).

    opsd-jax train --config configs/qwen3_8b_rlvr_v5e64.py --workdir runs/qwen3_8b_rlvr_v5e64 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_rlvr_v5e64.py --topology v5e:8x8

Its plan (2026-11-26, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5e:8x8: 64 x TPU v5 lite
    mesh (data x fsdp x tensor): 1 x 16 x 4; while sampling: 1 x 16 x 4

    HBM of a device, GiB, of 15.75
      rlvr reshard                9.30   6.45 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 3.81, temporaries
        3.81
      rlvr rollouts              11.04   4.71 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 3.81, cache 5.06,
        prompts' cache 0.07, temporaries 0.42
      rlvr step                   5.51   10.24 left
        parameters 0.48, optimizer 0.96, teacher 0.24, temporaries 3.83
      evaluation                  9.85   5.90 left
        parameters 0.48, weights for sampling 3.81, cache 5.06, prompts' cache 0.07, temporaries
        0.42

    of a device:                          compile     HBM  temporaries    TFLOP    moved  network
                                                s     GiB          GiB               GiB      GiB
      reshard                                   0    8.10         3.81        0     12.6     3.81
      rlvr rollouts: start                      0    5.06         0.00        0     5.06        0
      rlvr rollouts: prefill                    5    3.69         0.10     7.42     3.63     1.14
      rlvr rollouts: admit to 18432             3    5.31         0.18        0     1.82    0.281
      rlvr rollouts: decode in 18432           28    9.30         0.42     1.94      357    0.288
      rlvr: train step                        126    5.51         3.83     3811     7847      945
      evaluation: start                         0    5.06         0.00        0     5.06        0
      evaluation: prefill                       6    3.69         0.10     7.42     3.63     1.14
      evaluation: admit to 18432                2    5.31         0.18        0     1.82    0.281
      evaluation: decode in 18432              15    9.30         0.42     1.94      362    0.288

    roofline, s: at best; with products, memory and network one after the other
      rlvr reshard                   0.0      0.1
      rlvr rollouts                957.2    988.2
      rlvr step                    309.5    654.7
      evaluation                   242.7    250.5
      for responses of 50% of their budget, full prompts, all rows active; bfloat16,
      HBM and one ring of the network at the makers' speed
"""

from opsd_jax import recipes


def get_config():
    """Heads, vocabulary and, between layers, tokens lie over four chips; while sampling, weights
    over eight, as many as there are key-value heads, which leaves room for twice the slots.
    """
    config = recipes.paper_rlvr("qwen3-8b")
    config.mesh = (1, 16, 4)
    config.decode_mesh = (1, 8, 8)
    config.model.sequence_parallel = True
    config.rlvr.slots = 256
    return config
