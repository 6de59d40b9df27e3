"""OPSD on Qwen3-8B with the paper's settings, on a v5e-64 (64 chips of 16 GB).

    opsd-jax train --config configs/qwen3_8b_opsd_v5e64.py --workdir runs/qwen3_8b_opsd_v5e64 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_opsd_v5e64.py --topology v5e:8x8

Its plan (2026-11-26, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5e:8x8: 64 x TPU v5 lite
    mesh (data x fsdp x tensor): 1 x 16 x 4; while sampling: 1 x 8 x 8

    HBM of a device, GiB, of 15.75
      opsd reshard                5.21   10.54 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 1.91, temporaries
        1.63
      opsd rollouts               4.37   11.38 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 1.91, cache 0.63,
        prompts' cache 0.02, temporaries 0.14
      opsd memos                  5.26   10.49 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 1.91, cache 1.21,
        prompts' cache 0.16, temporaries 0.31
      opsd memos, closed          5.94   9.81 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 1.91, cache 1.35,
        prompts' cache 0.30, temporaries 0.71
      opsd step                   4.41   11.34 left
        parameters 0.48, optimizer 0.96, teacher 0.24, temporaries 2.73
      opsd probe memos            4.55   11.20 left
        parameters 0.48, the teacher's 0.48, weights for sampling 1.91, cache 1.21, prompts'
        cache 0.16, temporaries 0.31
      opsd probe memos, closed    5.23   10.52 left
        parameters 0.48, the teacher's 0.48, weights for sampling 1.91, cache 1.35, prompts'
        cache 0.30, temporaries 0.71
      opsd probe                  1.71   14.04 left
        parameters 0.48, the teacher's 0.48, temporaries 0.76
      evaluation                  5.08   10.67 left
        parameters 0.48, weights for sampling 1.91, cache 2.53, prompts' cache 0.02, temporaries
        0.14

    of a device:                          compile     HBM  temporaries    TFLOP    moved  network
                                                s     GiB          GiB               GiB      GiB
      reshard                                   2    4.01         1.63        0     7.07     2.38
      opsd rollouts: start                      0    0.63         0.00        0    0.633        0
      opsd rollouts: prefill                    7    1.82         0.04     1.82      1.7     0.57
      opsd rollouts: admit to 9216              2    0.75         0.10        0    0.229   0.0703
      opsd rollouts: decode in 9216            25    2.68         0.14    0.484      122    0.144
      opsd memos: start                         0    1.21         0.00        0     1.21        0
      opsd memos: prefill                       9    2.23         0.31     19.8     34.6     5.28
      opsd memos: admit to 17664                2    1.61         0.23        0     3.85     0.65
      opsd memos: decode in 17664              26    3.26         0.14    0.484      132    0.144
      opsd memos, closed: start                 0    1.35         0.00        0     1.35        0
      opsd memos, closed: prefill              10    2.78         0.71     42.2     97.7     9.84
      opsd memos, closed: admit to 19712        3    2.26         0.61        0     8.52     1.21
      opsd memos, closed: decode in 19712      28    3.40         0.14    0.484      120    0.144
      opsd: train step                        288    4.41         2.73      427      896      171
      opsd: probe                              60    1.71         0.76     94.6      150     38.4
      evaluation: start                         0    2.53         0.00        0     2.53        0
      evaluation: prefill                       7    1.82         0.04     1.82      1.7     0.57
      evaluation: admit to 9216                 2    2.65         0.10        0    0.229   0.0703
      evaluation: decode in 9216               27    4.58         0.14     1.94      173    0.577

    roofline, s: at best; with products, memory and network one after the other; how often
      opsd reshard                   0.0      0.0    100 x
      opsd rollouts                 20.5     21.3    100 x
      opsd memos                    22.6     23.9    100 x
      opsd memos, closed             5.3      5.8    100 x
      opsd step                      2.2      5.4    100 x   62% of its tokens are no padding
      opsd probe memos             221.0    237.0      2 x
      opsd probe memos, closed      18.0     23.0      2 x
      opsd probe                    15.4     35.3      2 x
      evaluation                    75.8     83.1      2 x
      in all 1.59 to 1.78 hours; times 64 devices 102 to 114
      Responses have 50% of their budget on average, spread exponentially; prompts are
      full, all rows active; bfloat16, HBM and one ring of the network go at the makers'
      speed; verdicts, saves and compiling take no time.
"""

from opsd_jax.config import recipes


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
