"""OPSD on Qwen3-8B with the paper's settings, on a v5e-64 (64 chips of 16 GB).

    opsd-jax train --config configs/qwen3_8b_opsd_v5e64.py --workdir runs/qwen3_8b_opsd_v5e64 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_opsd_v5e64.py --topology v5e:8x8

Its plan (2026-11-26, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5e:8x8: 64 x TPU v5 lite
    mesh (data x fsdp x tensor): 1 x 16 x 4; while sampling: 1 x 16 x 4

    HBM of a device, GiB, of 15.75
      opsd reshard                9.30   6.45 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 3.81, temporaries
        3.81
      opsd rollouts               6.58   9.17 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 3.81, cache 0.63,
        prompts' cache 0.04, temporaries 0.42
      opsd memos                  7.60   8.15 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 3.81, cache 1.21,
        prompts' cache 0.33, temporaries 0.58
      opsd memos, closed          8.66   7.09 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 3.81, cache 1.35,
        prompts' cache 0.61, temporaries 1.21
      opsd step                   4.41   11.34 left
        parameters 0.48, optimizer 0.96, teacher 0.24, temporaries 2.73
      opsd probe memos            6.89   8.86 left
        parameters 0.48, the teacher's 0.48, weights for sampling 3.81, cache 1.21, prompts'
        cache 0.33, temporaries 0.58
      opsd probe memos, closed    7.94   7.81 left
        parameters 0.48, the teacher's 0.48, weights for sampling 3.81, cache 1.35, prompts'
        cache 0.61, temporaries 1.21
      opsd probe                  1.71   14.04 left
        parameters 0.48, the teacher's 0.48, temporaries 0.76
      evaluation                  7.28   8.47 left
        parameters 0.48, weights for sampling 3.81, cache 2.53, prompts' cache 0.04, temporaries
        0.42

    of a device:                          compile     HBM  temporaries    TFLOP    moved  network
                                                s     GiB          GiB               GiB      GiB
      reshard                                   0    8.10         3.81        0     12.6     3.81
      opsd rollouts: start                      0    0.63         0.00        0    0.633        0
      opsd rollouts: prefill                    3    3.63         0.07     3.63     3.37     0.57
      opsd rollouts: admit to 9216              1    0.78         0.11        0    0.715    0.141
      opsd rollouts: decode in 9216            14    4.87         0.42    0.484      266   0.0719
      opsd memos: start                         0    1.21         0.00        0     1.21        0
      opsd memos: prefill                       5    4.32         0.47     39.5     50.1     5.28
      opsd memos: admit to 17664                1    2.12         0.58        0     8.27      1.3
      opsd memos: decode in 17664              21    5.45         0.42    0.484      306   0.0719
      opsd memos, closed: start                 0    1.35         0.00        0     1.35        0
      opsd memos, closed: prefill              10    5.14         1.01     84.4      124     9.84
      opsd memos, closed: admit to 19712        2    3.17         1.21        0     12.7     2.43
      opsd memos, closed: decode in 19712      16    5.59         0.42    0.484      336   0.0719
      opsd: train step                        203    4.41         2.73      426      892      170
      opsd: probe                              17    1.71         0.76     94.6      150     38.2
      evaluation: start                         0    2.53         0.00        0     2.53        0
      evaluation: prefill                       3    3.63         0.07     3.63     3.37     0.57
      evaluation: admit to 9216                 1    2.67         0.11        0    0.715    0.141
      evaluation: decode in 9216               15    6.77         0.42     1.94      308    0.288

    roofline, s: at best; with products, memory and network one after the other
      opsd reshard                   0.0      0.1
      opsd rollouts                 22.3     22.6
      opsd memos                    26.0     26.6
      opsd memos, closed             7.9      8.6
      opsd step                      2.2      5.4
      opsd probe memos             832.8    850.7
      opsd probe memos, closed     252.5    276.1
      opsd probe                    30.7     70.6
      evaluation                   103.2    107.1
      for responses of 50% of their budget, full prompts, all rows active; bfloat16,
      HBM and one ring of the network at the makers' speed
"""

from opsd_jax import recipes


def get_config():
    """Heads, vocabulary and, between layers, tokens lie over four chips; while sampling, weights
    over eight, as many as there are key-value heads.
    """
    config = recipes.paper_opsd("qwen3-8b")
    config.mesh = (1, 16, 4)
    config.decode_mesh = (1, 8, 8)
    config.model.sequence_parallel = True
    config.opsd.memo.slots = 32
    return config
