"""OPSD on Qwen3-8B with the paper's settings, on a v5p-32 (16 chips of 95 GB).

    opsd-jax train --config configs/qwen3_8b_opsd_v5p32.py --workdir runs/qwen3_8b_opsd_v5p32 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_opsd_v5p32.py --topology v5p:2x2x4

Its plan (2026-11-26, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5p:2x2x4: 16 x TPU v5
    mesh (data x fsdp x tensor): 1 x 8 x 2; while sampling: 1 x 4 x 4

    HBM of a device, GiB, of 95.74
      opsd reshard               13.24   82.50 left
        parameters 1.91, optimizer 3.82, teacher 0.95, weights for sampling 3.81, temporaries
        2.74
      opsd rollouts              13.52   82.22 left
        parameters 1.91, optimizer 3.82, teacher 0.95, weights for sampling 3.81, cache 2.53,
        prompts' cache 0.07, temporaries 0.43
      opsd memos                 17.08   78.66 left
        parameters 1.91, optimizer 3.82, teacher 0.95, weights for sampling 3.81, cache 4.85,
        prompts' cache 0.65, temporaries 1.08
      opsd memos, closed         19.14   76.60 left
        parameters 1.91, optimizer 3.82, teacher 0.95, weights for sampling 3.81, cache 5.41,
        prompts' cache 1.21, temporaries 2.02
      opsd step                  15.15   80.59 left
        parameters 1.91, optimizer 3.82, teacher 0.95, temporaries 8.47
      opsd probe memos           14.22   81.52 left
        parameters 1.91, the teacher's 1.91, weights for sampling 3.81, cache 4.85, prompts'
        cache 0.65, temporaries 1.08
      opsd probe memos, closed   16.28   79.46 left
        parameters 1.91, the teacher's 1.91, weights for sampling 3.81, cache 5.41, prompts'
        cache 1.21, temporaries 2.02
      opsd probe                  5.41   90.33 left
        parameters 1.91, the teacher's 1.91, temporaries 1.59
      evaluation                 16.33   79.41 left
        parameters 1.91, weights for sampling 3.81, cache 10.12, prompts' cache 0.04,
        temporaries 0.45

    of a device:                          compile     HBM  temporaries    TFLOP    moved  network
                                                s     GiB          GiB               GiB      GiB
      reshard                                   2    8.46         2.74        0     22.1     5.72
      opsd rollouts: start                      0    2.53         0.00        0     2.53        0
      opsd rollouts: prefill                   13    3.70         0.10     7.27     13.3     1.14
      opsd rollouts: admit to 9216              4    2.79         0.19        0     1.45    0.141
      opsd rollouts: decode in 9216            28    6.78         0.43     1.94      265    0.288
      opsd memos: start                         0    4.85         0.00        0     4.85        0
      opsd memos: prefill                      16    5.26         1.08       79      141     10.6
      opsd memos: admit to 17664                8    6.19         0.69        0     14.7      1.3
      opsd memos: decode in 17664              29    9.10         0.43     1.94      303    0.288
      opsd memos, closed: start                 0    5.41         0.00        0     5.41        0
      opsd memos, closed: prefill              21    6.76         2.02      169      264     19.7
      opsd memos, closed: admit to 19712        7    7.97         1.35        0       28     2.43
      opsd memos, closed: decode in 19712      30    9.66         0.43     1.94      257    0.288
      opsd: train step                        237   15.15         8.47     1499     3774      195
      opsd: probe                              38    5.41         1.59      189      540     27.3
      evaluation: start                         0   10.13         0.00        0     10.1        0
      evaluation: prefill                      11    3.61         0.05     3.63     9.17     0.57
      evaluation: admit to 9216                 2   10.36         0.20        0     1.02    0.141
      evaluation: decode in 9216               36   14.39         0.45     7.75      486     1.15

    roofline, s: at best; with products, memory and network one after the other; how often
      opsd reshard                   0.0      0.0    100 x
      opsd rollouts                 13.2     14.1    100 x
      opsd memos                    15.8     17.3    100 x
      opsd memos, closed             3.6      4.1    100 x
      opsd step                      3.3      6.3    100 x   70% of its tokens are no padding
      opsd probe memos             168.7    186.3      2 x
      opsd probe memos, closed      16.6     20.9      2 x
      opsd probe                    26.4     53.5      2 x
      evaluation                    62.9     72.1      2 x
      in all 1.15 to 1.35 hours; times 16 devices 18.4 to 21.6
      Responses have 50% of their budget on average, spread exponentially; prompts are
      full, all rows active; bfloat16, HBM and one ring of the network go at the makers'
      speed; verdicts, saves and compiling take no time.
"""

from opsd_jax.config import recipes


def get_config():
    """Weights are cut over four chips while sampling: every step reads them. In training rows are
    over two chips each: a step has 32, and in microbatches of 16 more of it would be padding.
    """
    config = recipes.paper_opsd("qwen3-8b")
    config.mesh = (1, 8, 2)
    config.opsd.microbatch = 8
    config.decode_mesh = (1, 4, 4)
    config.opsd.memo.slots = 32
    return config
