"""OPSD on Qwen3-32B with the paper's settings, on a v5p-128 (64 chips of 95 GB).

    opsd-jax train --config configs/qwen3_32b_opsd_v5p128.py --workdir runs/qwen3_32b_opsd_v5p128 \
        --config.model.path=/models/Qwen3-32B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_32b_opsd_v5p128.py --topology v5p:4x4x4

Its plan (2026-11-26, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5p:4x4x4: 64 x TPU v5
    mesh (data x fsdp x tensor): 1 x 16 x 4; while sampling: 1 x 8 x 8

    HBM of a device, GiB, of 95.74
      opsd reshard               19.37   76.37 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 7.63, temporaries
        5.06
      opsd rollouts              16.10   79.64 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 7.63, cache 1.12,
        prompts' cache 0.03, temporaries 0.63
      opsd memos                 17.39   78.35 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 7.63, cache 2.16,
        prompts' cache 0.29, temporaries 0.63
      opsd memos, closed         18.34   77.40 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 7.63, cache 2.41,
        prompts' cache 0.54, temporaries 1.09
      opsd step                  14.48   81.26 left
        parameters 1.91, optimizer 3.82, teacher 0.96, temporaries 7.80
      opsd probe memos           14.52   81.22 left
        parameters 1.91, the teacher's 1.91, weights for sampling 7.63, cache 2.16, prompts'
        cache 0.29, temporaries 0.63
      opsd probe memos, closed   15.48   80.26 left
        parameters 1.91, the teacher's 1.91, weights for sampling 7.63, cache 2.41, prompts'
        cache 0.54, temporaries 1.09
      opsd probe                  5.55   90.19 left
        parameters 1.91, the teacher's 1.91, temporaries 1.73
      evaluation                 14.71   81.03 left
        parameters 1.91, weights for sampling 7.63, cache 4.50, prompts' cache 0.03, temporaries
        0.64

    of a device:                          compile     HBM  temporaries    TFLOP    moved  network
                                                s     GiB          GiB               GiB      GiB
      reshard                                   4   14.59         5.06        0     33.9     9.53
      opsd rollouts: start                      0    1.13         0.00        0     1.13        0
      opsd rollouts: prefill                   14    7.53         0.05     8.13     18.6     1.26
      opsd rollouts: admit to 9216              5    1.21         0.05        0    0.699    0.125
      opsd rollouts: decode in 9216            51    9.39         0.63     2.05      496    0.316
      opsd memos: start                         0    2.16         0.00        0     2.16        0
      opsd memos: prefill                      15    8.32         0.58     85.7      151     11.7
      opsd memos: admit to 17664                4    2.77         0.33        0     8.09     1.16
      opsd memos: decode in 17664              41   10.42         0.63     2.05      513    0.316
      opsd memos, closed: start                 0    2.41         0.00        0     2.41        0
      opsd memos, closed: prefill              16    9.08         1.09      179      286     21.7
      opsd memos, closed: admit to 19712        4    3.59         0.64        0     15.4     2.16
      opsd memos, closed: decode in 19712      46   10.67         0.63     2.05      493    0.316
      opsd: train step                        291   14.48         7.80     1795     5466      635
      opsd: probe                              45    5.55         1.73      401     1271      144
      evaluation: start                         0    4.50         0.00        0      4.5        0
      evaluation: prefill                      11    7.53         0.05     8.13     18.6     1.26
      evaluation: admit to 9216                 6    4.58         0.05        0    0.699    0.125
      evaluation: decode in 9216               69   12.78         0.64     8.19      594     1.27

    roofline, s: at best; with products, memory and network one after the other; how often
      opsd reshard                   0.1      0.1    100 x
      opsd rollouts                 24.7     25.8    100 x
      opsd memos                    26.3     28.1    100 x
      opsd memos, closed             6.5      7.1    100 x
      opsd step                      5.6     11.7    100 x   62% of its tokens are no padding
      opsd probe memos             244.0    264.4      2 x
      opsd probe memos, closed      20.8     25.9      2 x
      opsd probe                    43.5     87.1      2 x
      evaluation                    76.8     87.3      2 x
      in all 1.97 to 2.28 hours; times 64 devices 126 to 146
      Responses have 50% of their budget on average, spread exponentially; prompts are
      full, all rows active; bfloat16, HBM and one ring of the network go at the makers'
      speed; verdicts, saves and compiling take no time.
"""

from opsd_jax.config import recipes


def get_config():
    """Sixteen rows at a time, each over four chips. While sampling, weights are cut over eight, as
    many as there are key-value heads: every step reads them.
    """
    config = recipes.paper_opsd("qwen3-32b")
    config.mesh = (1, 16, 4)
    config.decode_mesh = (1, 8, 8)
    config.model.sequence_parallel = True
    config.opsd.memo.slots = 32
    return config
