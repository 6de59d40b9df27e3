"""OPSD on Qwen3-8B with the paper's settings, on a v5p-32 (16 chips of 95 GB).

    opsd-jax train --config configs/qwen3_8b_opsd_v5p32.py --workdir runs/qwen3_8b_opsd_v5p32 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_opsd_v5p32.py --topology v5p:2x2x4

Its plan (2026-11-25, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5p:2x2x4: 16 x TPU v5
    mesh (data x fsdp x tensor): 1 x 16 x 1; while sampling: 1 x 4 x 4

    HBM of a device, GiB, of 95.74
      opsd rollouts            13.52   82.22 left
        parameters 1.91, optimizer 3.82, teacher 0.95, weights for sampling 3.81, cache 2.53,
        prompts' cache 0.07, temporaries 0.43
      opsd memos               17.08   78.66 left
        parameters 1.91, optimizer 3.82, teacher 0.95, weights for sampling 3.81, cache 4.85,
        prompts' cache 0.65, temporaries 1.08
      opsd memos, closed       19.14   76.60 left
        parameters 1.91, optimizer 3.82, teacher 0.95, weights for sampling 3.81, cache 5.41,
        prompts' cache 1.21, temporaries 2.02
      opsd step                17.68   78.06 left
        parameters 1.91, optimizer 3.82, teacher 0.95, temporaries 11.00
      evaluation               16.33   79.41 left
        parameters 1.91, weights for sampling 3.81, cache 10.12, prompts' cache 0.04,
        temporaries 0.45

    of a device:                          compile    HBM  temporaries   TFLOP   moved  network
                                                s    GiB          GiB             GiB      GiB
      reshard                                   1   8.25         2.53       0   19.91     4.77
      opsd rollouts: start                      0   2.53         0.00       0   2.531        0
      opsd rollouts: prefill                   13   3.70         0.10   7.267   13.27     1.14
      opsd rollouts: admit to 9216              9   2.79         0.19       0   1.445  0.00781
      opsd rollouts: decode in 9216            31   6.78         0.43   1.937   289.9    0.288
      opsd memos: start                         0   4.85         0.00       0   4.852        0
      opsd memos: prefill                      16   5.26         1.08   79.02   140.8     10.6
      opsd memos: admit to 17664                5   6.19         0.69       0   14.69      1.3
      opsd memos: decode in 17664              23   9.10         0.43   1.937   438.4    0.288
      opsd memos, closed: start                 0   5.41         0.00       0   5.414        0
      opsd memos, closed: prefill              21   6.76         2.02   168.7   263.5     19.7
      opsd memos, closed: admit to 19712        9   7.97         1.35       0   27.96     2.43
      opsd memos, closed: decode in 19712      31   9.66         0.43   1.937   555.4    0.288
      opsd: train step                        154  17.68        11.00    1755    5433      122
      opsd: probe                              10   6.86         3.04   388.7    1588       30
      evaluation: start                         0  10.13         0.00       0   10.13        0
      evaluation: prefill                       5   3.61         0.05   3.634    9.17     0.57
      evaluation: admit to 9216                 4  10.36         0.20       0    1.02   0.0117
      evaluation: decode in 9216               36  14.39         0.45    7.75   480.2     1.15

    roofline, s: at best; with products, memory and network one after the other
      opsd rollouts               7.3      7.8
      opsd memos                 11.6     12.6
      opsd memos, closed          4.9      6.1
      opsd step                   3.8      7.2
      evaluation                 47.8     54.9
      for responses of 50% of their budget, full prompts, all rows active; bfloat16,
      HBM and one ring of the network at the makers' speed
"""

from opsd_jax import recipes


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
