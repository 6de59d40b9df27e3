"""OPSD on AceReason-Nemotron-7B with the paper's settings, on a v5p-32 (16 chips of 95 GB).

    opsd-jax train --config configs/acereason_7b_opsd_v5p32.py --workdir runs/acereason \
        --config.model.path=/models/AceReason-7B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/acereason_7b_opsd_v5p32.py --topology v5p:2x2x4

Its plan (2026-11-26, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5p:2x2x4: 16 x TPU v5
    mesh (data x fsdp x tensor): 1 x 8 x 2; while sampling: 1 x 4 x 4

    HBM of a device, GiB, of 95.74
      opsd reshard               12.03   83.71 left
        parameters 1.77, optimizer 3.55, teacher 0.89, weights for sampling 3.55, temporaries
        2.28
      opsd rollouts              10.85   84.89 left
        parameters 1.77, optimizer 3.55, teacher 0.89, weights for sampling 3.55, cache 0.98,
        prompts' cache 0.03, temporaries 0.08
      opsd memos                 12.57   83.17 left
        parameters 1.77, optimizer 3.55, teacher 0.89, weights for sampling 3.55, cache 1.89,
        prompts' cache 0.25, temporaries 0.67
      opsd memos, closed         13.59   82.15 left
        parameters 1.77, optimizer 3.55, teacher 0.89, weights for sampling 3.55, cache 2.11,
        prompts' cache 0.47, temporaries 1.26
      opsd step                  13.67   82.07 left
        parameters 1.77, optimizer 3.55, teacher 0.89, temporaries 7.45
      opsd probe memos            9.91   85.83 left
        parameters 1.77, the teacher's 1.77, weights for sampling 3.55, cache 1.89, prompts'
        cache 0.25, temporaries 0.67
      opsd probe memos, closed   10.93   84.81 left
        parameters 1.77, the teacher's 1.77, weights for sampling 3.55, cache 2.11, prompts'
        cache 0.47, temporaries 1.26
      opsd probe                  5.23   90.51 left
        parameters 1.77, the teacher's 1.77, temporaries 1.69
      evaluation                  9.32   86.42 left
        parameters 1.77, weights for sampling 3.55, cache 3.94, prompts' cache 0.01, temporaries
        0.04

    of a device:                          compile     HBM  temporaries    TFLOP    moved  network
                                                s     GiB          GiB               GiB      GiB
      reshard                                   5    7.60         2.28        0     20.8     5.32
      opsd rollouts: start                      0    0.98         0.00        0    0.984        0
      opsd rollouts: prefill                   11    3.39         0.07     6.79     11.7    0.779
      opsd rollouts: admit to 9216              2    1.09         0.08        0    0.645   0.0547
      opsd rollouts: decode in 9216            18    4.54         0.01     1.81      227    0.197
      opsd memos: start                         0    1.89         0.00        0     1.89        0
      opsd memos: prefill                      13    4.22         0.67     70.8      104     7.21
      opsd memos: admit to 17664                9    2.46         0.32        0     5.56    0.506
      opsd memos: decode in 17664              18    5.44         0.01     1.81      242    0.197
      opsd memos, closed: start                 0    2.11         0.00        0     2.11        0
      opsd memos, closed: prefill              12    5.02         1.26      147      192     13.4
      opsd memos, closed: admit to 19712        8    3.22         0.64        0     10.6    0.943
      opsd memos, closed: decode in 19712      20    5.66         0.01     1.81      224    0.197
      opsd: train step                        239   13.67         7.45     1321     3279      163
      opsd: probe                              33    5.23         1.69      168      485     22.5
      evaluation: start                         0    3.94         0.00        0     3.94        0
      evaluation: prefill                       8    3.34         0.03     3.39     6.99     0.39
      evaluation: admit to 9216                 5    4.00         0.04        0    0.307   0.0547
      evaluation: decode in 9216               26    7.52         0.03     7.24      333    0.792

    roofline, s: at best; with products, memory and network one after the other; how often
      opsd reshard                   0.0      0.0    100 x
      opsd rollouts                 11.3     12.1    100 x
      opsd memos                    12.6     13.8    100 x
      opsd memos, closed             3.1      3.5    100 x
      opsd step                      2.9      5.5    100 x   70% of its tokens are no padding
      opsd probe memos             123.8    137.0      2 x
      opsd probe memos, closed      12.1     15.1      2 x
      opsd probe                    23.5     47.3      2 x
      evaluation                    43.0     50.7      2 x
      in all 0.945 to 1.11 hours; times 16 devices 15.1 to 17.8
      Responses have 50% of their budget on average, spread exponentially; prompts are
      full, all rows active; bfloat16, HBM and one ring of the network go at the makers'
      speed; verdicts, saves and compiling take no time.
"""

from opsd_jax.config import recipes


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
