"""RLVR on Qwen3-8B with the settings of the paper's baseline, on a v5e-64 (64 chips of 16 GB).

    opsd-jax train --config configs/qwen3_8b_rlvr_v5e64.py --workdir runs/qwen3_8b_rlvr_v5e64 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_rlvr_v5e64.py --topology v5e:8x8

Its plan (2026-11-26, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5e:8x8: 64 x TPU v5 lite
    mesh (data x fsdp x tensor): 1 x 16 x 4; while sampling: 1 x 8 x 8

    HBM of a device, GiB, of 15.75
      rlvr reshard                5.21   10.54 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 1.91, temporaries
        1.63
      rlvr rollouts              13.88   1.87 left
        parameters 0.48, optimizer 0.96, teacher 0.24, weights for sampling 1.91, cache 10.12,
        prompts' cache 0.04, temporaries 0.14
      rlvr step                   5.51   10.24 left
        parameters 0.48, optimizer 0.96, teacher 0.24, batch 0.01, temporaries 3.83
      evaluation                  7.62   8.13 left
        parameters 0.48, weights for sampling 1.91, cache 5.06, prompts' cache 0.04, temporaries
        0.14

    of a device:                          compile     HBM  temporaries    TFLOP    moved  network
                                                s     GiB          GiB               GiB      GiB
      reshard                                   4    4.01         1.63        0     7.07     2.38
      rlvr rollouts: start                      0   10.13         0.00        0     10.1        0
      rlvr rollouts: prefill                   14    1.88         0.08     3.71     1.76     1.14
      rlvr rollouts: admit to 18432             6   10.27         0.11        0    0.555    0.141
      rlvr rollouts: decode in 18432           95   12.18         0.14     3.87      361     1.15
      rlvr: train step                        587    5.51         3.83     2394     5029      760
      evaluation: start                         1    5.06         0.00        0     5.06        0
      evaluation: prefill                      14    1.88         0.08     3.71     1.76     1.14
      evaluation: admit to 18432                3    5.21         0.11        0    0.547    0.141
      evaluation: decode in 18432              29    7.11         0.14     1.94      229    0.577

    roofline, s: at best; with products, memory and network one after the other; how often
      rlvr reshard                   0.0      0.0    100 x
      rlvr rollouts                562.4    615.1    100 x
      rlvr step                    194.4    446.4    100 x   83% of its tokens are no padding
      evaluation                   199.6    214.3      2 x
      in all 21.1 to 29.6 hours; times 64 devices 1353 to 1895
      Responses have 50% of their budget on average, spread exponentially; prompts are
      full, all rows active; bfloat16, HBM and one ring of the network go at the makers'
      speed; verdicts, saves and compiling take no time.
"""

from opsd_jax.config import recipes


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
