"""RLVR on Qwen3-8B with the settings of the paper's baseline, on a v5p-32 (16 chips of 95 GB).

    opsd-jax train --config configs/qwen3_8b_rlvr_v5p32.py --workdir runs/qwen3_8b_rlvr_v5p32 \
        --config.model.path=/models/Qwen3-8B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_8b_rlvr_v5p32.py --topology v5p:2x2x4

Its plan (2026-11-26, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5p:2x2x4: 16 x TPU v5
    mesh (data x fsdp x tensor): 1 x 16 x 1; while sampling: 1 x 4 x 4

    HBM of a device, GiB, of 95.74
      rlvr reshard               13.02   82.72 left
        parameters 1.91, optimizer 3.82, teacher 0.95, weights for sampling 3.81, temporaries
        2.53
      rlvr rollouts              51.61   44.13 left
        parameters 1.91, optimizer 3.82, teacher 0.95, weights for sampling 3.81, cache 40.50,
        prompts' cache 0.14, temporaries 0.48
      rlvr step                  19.97   75.77 left
        parameters 1.91, optimizer 3.82, teacher 0.95, batch 0.01, temporaries 13.28
      evaluation                 26.49   69.25 left
        parameters 1.91, weights for sampling 3.81, cache 20.25, prompts' cache 0.07,
        temporaries 0.45

    of a device:                          compile     HBM  temporaries    TFLOP    moved  network
                                                s     GiB          GiB               GiB      GiB
      reshard                                   3    8.25         2.53        0     19.9     4.77
      rlvr rollouts: start                      0   40.50         0.00        0     40.5        0
      rlvr rollouts: prefill                   41    3.89         0.23     14.8     29.3     2.28
      rlvr rollouts: admit to 18432            52   40.87         0.23        0     3.14    0.281
      rlvr rollouts: decode in 18432          144   44.80         0.48     15.5     1237      2.3
      rlvr: train step                        482   19.97        13.28     9574    25130      488
      evaluation: start                         1   20.25         0.00        0     20.3        0
      evaluation: prefill                      15    3.70         0.10     7.42     14.5     1.14
      evaluation: admit to 18432               13   20.56         0.24        0     1.95    0.281
      evaluation: decode in 18432              39   24.52         0.45     7.75      707     1.15

    roofline, s: at best; with products, memory and network one after the other; how often
      rlvr reshard                   0.0      0.0    100 x
      rlvr rollouts                570.8    636.8    100 x
      rlvr step                    333.7    571.3    100 x   83% of its tokens are no padding
      evaluation                   182.6    201.0      2 x
      in all 25.2 to 33.7 hours; times 16 devices 404 to 539
      Responses have 50% of their budget on average, spread exponentially; prompts are
      full, all rows active; bfloat16, HBM and one ring of the network go at the makers'
      speed; verdicts, saves and compiling take no time.
"""

from opsd_jax.config import recipes


def get_config():
    """Weights are cut over four chips while sampling."""
    config = recipes.paper_rlvr("qwen3-8b")
    config.decode_mesh = (1, 4, 4)
    return config
