"""OPSD on Qwen3-0.6B, on one v5e-4 (four chips of 16 GB): the smallest that one can rent.

    opsd-jax train --config configs/qwen3_0_6b_opsd_v5e4.py --workdir runs/qwen3_0_6b_opsd_v5e4 \
        --config.model.path=/models/Qwen3-0.6B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_0_6b_opsd_v5e4.py --topology v5e:2x2

Its plan (2026-11-26, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5e:2x2: 4 x TPU v5 lite
    mesh (data x fsdp x tensor): 1 x 4 x 1; while sampling: 1 x 4 x 1

    HBM of a device, GiB, of 15.75
      opsd reshard                4.16   11.59 left
        parameters 0.56, optimizer 1.11, teacher 0.28, weights for sampling 1.11, temporaries
        1.11
      opsd rollouts              11.44   4.31 left
        parameters 0.56, optimizer 1.11, teacher 0.28, weights for sampling 1.11, cache 7.88,
        prompts' cache 0.22, temporaries 0.30
      opsd memos                 11.73   4.02 left
        parameters 0.56, optimizer 1.11, teacher 0.28, weights for sampling 1.11, cache 4.92,
        prompts' cache 1.01, temporaries 2.75
      opsd memos, closed         12.76   2.99 left
        parameters 0.56, optimizer 1.11, teacher 0.28, weights for sampling 1.11, cache 5.14,
        prompts' cache 1.23, temporaries 3.34
      opsd step                   5.24   10.51 left
        parameters 0.56, optimizer 1.11, teacher 0.28, temporaries 3.29
      opsd probe memos           10.90   4.85 left
        parameters 0.56, the teacher's 0.56, weights for sampling 1.11, cache 4.92, prompts'
        cache 1.01, temporaries 2.75
      opsd probe memos, closed   11.93   3.82 left
        parameters 0.56, the teacher's 0.56, weights for sampling 1.11, cache 5.14, prompts'
        cache 1.23, temporaries 3.34
      opsd probe                  2.31   13.44 left
        parameters 0.56, the teacher's 0.56, temporaries 1.19
      evaluation                  9.99   5.76 left
        parameters 0.56, weights for sampling 1.11, cache 7.88, prompts' cache 0.11, temporaries
        0.34

    of a device:                          compile     HBM  temporaries    TFLOP    moved  network
                                                s     GiB          GiB               GiB      GiB
      reshard                                   0    2.78         1.11        0     4.62     1.11
      opsd rollouts: start                      0    7.88         0.00        0     7.88        0
      opsd rollouts: prefill                    9    1.59         0.26     2.04     3.14        0
      opsd rollouts: admit to 9216              4    8.39         0.30        0      4.3    0.438
      opsd rollouts: decode in 9216            32    9.21         0.22     0.61      183 2.31e-05
      opsd memos: start                         0    4.92         0.00        0     4.92        0
      opsd memos: prefill                      11    3.30         1.17     18.6     37.3        0
      opsd memos: admit to 11520                2    8.68         2.75        0     29.3     4.05
      opsd memos: decode in 11520              29    6.25         0.22    0.305      178 1.16e-05
      opsd memos, closed: start                 0    5.14         0.00        0     5.14        0
      opsd memos, closed: prefill              13    3.77         1.43     25.4     47.5        0
      opsd memos, closed: admit to 12032        2    9.71         3.34        0     35.7     4.92
      opsd memos, closed: decode in 12032      33    6.47         0.22    0.305      118 1.16e-05
      opsd: train step                        268    5.24         3.29      741     1381     34.8
      opsd: probe                              55    2.31         1.19     48.6     79.7     1.85
      evaluation: start                         0    7.88         0.00        0     7.88        0
      evaluation: prefill                      14    1.34         0.12     1.02     3.35        0
      evaluation: admit to 9216                 6    8.33         0.34        0     3.34    0.438
      evaluation: decode in 9216               62    9.21         0.22     0.61      300 2.36e-05

    roofline, s: at best; with products, memory and network one after the other; how often
      opsd reshard                   0.0      0.0    100 x
      opsd rollouts                 30.8     31.3    100 x
      opsd memos                    13.1     13.9    100 x
      opsd memos, closed             1.7      1.9    100 x
      opsd step                      3.8      6.2    100 x   75% of its tokens are no padding
      opsd probe memos             183.8    195.8      2 x
      opsd probe memos, closed      15.7     18.6      2 x
      opsd probe                    31.5     49.4      2 x
      evaluation                   432.3    436.3      2 x
      in all 1.74 to 1.87 hours; times 4 devices 6.97 to 7.48
      Responses have 50% of their budget on average, spread exponentially; prompts are
      full, all rows active; bfloat16, HBM and one ring of the network go at the makers'
      speed; verdicts, saves and compiling take no time.
"""

from opsd_jax.config import recipes


def get_config():
    """The paper's settings; a memo may have 2,048 tokens."""
    config = recipes.paper_opsd("qwen3-0.6b")
    config.opsd.microbatch = 4
    config.opsd.memo.update({"tokens": 2048, "close_tokens": 512, "slots": 16})
    config.evaluation.slots = 32
    return config
