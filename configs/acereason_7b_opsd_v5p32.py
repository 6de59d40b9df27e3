"""OPSD on AceReason-Nemotron-7B with the paper's settings, on a v5p-32 (16 chips of 95 GB).

    opsd-jax train --config configs/acereason_7b_opsd_v5p32.py --workdir runs/acereason \
        --config.model.path=/models/AceReason-7B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/acereason_7b_opsd_v5p32.py --topology v5p:2x2x4

Its plan (2026-11-25, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5p:2x2x4: 16 x TPU v5
    mesh (data x fsdp x tensor): 1 x 16 x 1; while sampling: 1 x 4 x 4

    HBM of a device, GiB, of 95.74
      opsd rollouts            10.85   84.89 left
        parameters 1.77, optimizer 3.55, teacher 0.89, weights for sampling 3.55, cache 0.98,
        prompts' cache 0.03, temporaries 0.08
      opsd memos               12.57   83.17 left
        parameters 1.77, optimizer 3.55, teacher 0.89, weights for sampling 3.55, cache 1.89,
        prompts' cache 0.25, temporaries 0.67
      opsd memos, closed       13.59   82.15 left
        parameters 1.77, optimizer 3.55, teacher 0.89, weights for sampling 3.55, cache 2.11,
        prompts' cache 0.47, temporaries 1.26
      opsd step                15.69   80.05 left
        parameters 1.77, optimizer 3.55, teacher 0.89, temporaries 9.48
      evaluation                9.32   86.42 left
        parameters 1.77, weights for sampling 3.55, cache 3.94, prompts' cache 0.01, temporaries
        0.04

    of a device:                          compile    HBM  temporaries   TFLOP   moved  network
                                                s    GiB          GiB             GiB      GiB
      reshard                                   4   7.56         2.24       0   19.04     4.43
      opsd rollouts: start                      0   0.98         0.00       0  0.9844        0
      opsd rollouts: prefill                   19   3.39         0.07   6.787   11.68    0.779
      opsd rollouts: admit to 9216              6   1.09         0.08       0  0.6445  0.00195
      opsd rollouts: decode in 9216            30   4.54         0.01    1.81   240.8    0.198
      opsd memos: start                         0   1.89         0.00       0   1.887        0
      opsd memos: prefill                      19   4.22         0.67   70.81   104.3     7.21
      opsd memos: admit to 17664               14   2.46         0.32       0   5.564    0.506
      opsd memos: decode in 17664              31   5.44         0.01    1.81   298.6    0.198
      opsd memos, closed: start                 0   2.11         0.00       0   2.105        0
      opsd memos, closed: prefill              21   5.02         1.26   146.6   192.5     13.4
      opsd memos, closed: admit to 19712       29   3.22         0.64       0   10.58    0.943
      opsd memos, closed: decode in 19712      31   5.66         0.01    1.81   344.1    0.198
      opsd: train step                        282  15.69         9.48    1541    5039      112
      opsd: probe                              33   6.29         2.74   345.9    1511       28
      evaluation: start                         0   3.94         0.00       0   3.938        0
      evaluation: prefill                       4   3.34         0.03   3.394   6.993     0.39
      evaluation: admit to 9216                 4   4.00         0.04       0  0.3067  0.00391
      evaluation: decode in 9216               14   7.52         0.03    7.24   330.7    0.792

    roofline, s: at best; with products, memory and network one after the other
      opsd rollouts               6.0      6.4
      opsd memos                  8.0      8.8
      opsd memos, closed          3.4      4.3
      opsd step                   3.4      6.5
      evaluation                 32.9     38.9
      for responses of 50% of their budget, full prompts, all rows active; bfloat16,
      HBM and one ring of the network at the makers' speed
"""

from opsd_jax import recipes


def get_config():
    """Weights are cut over four chips while sampling, as many as there are key-value heads; rows
    over two in training, as in qwen3_8b_opsd_v5p32.py.
    """
    config = recipes.paper_opsd("acereason-nemotron-7b")
    config.mesh = (1, 8, 2)
    config.opsd.microbatch = 8
    config.decode_mesh = (1, 4, 4)
    config.opsd.memo.slots = 32
    return config
