"""OPSD on Qwen3-32B with the paper's settings, on a v5p-128 (64 chips of 95 GB).

    opsd-jax train --config configs/qwen3_32b_opsd_v5p128.py --workdir runs/qwen3_32b_opsd_v5p128 \
        --config.model.path=/models/Qwen3-32B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_32b_opsd_v5p128.py --topology v5p:4x4x4

Its plan (2026-11-26, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5p:4x4x4: 64 x TPU v5
    mesh (data x fsdp x tensor): 1 x 16 x 4; while sampling: 1 x 16 x 4

    HBM of a device, GiB, of 95.74
      opsd reshard               33.66   62.08 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 15.26, temporaries
        11.72
      opsd rollouts              24.69   71.05 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 15.26, cache 1.12,
        prompts' cache 0.06, temporaries 1.57
      opsd memos                 26.24   69.50 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 15.26, cache 2.16,
        prompts' cache 0.58, temporaries 1.57
      opsd memos, closed         27.26   68.48 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 15.26, cache 2.41,
        prompts' cache 1.08, temporaries 1.84
      opsd step                  14.48   81.26 left
        parameters 1.91, optimizer 3.82, teacher 0.96, temporaries 7.80
      opsd probe memos           23.37   72.37 left
        parameters 1.91, the teacher's 1.91, weights for sampling 15.26, cache 2.16, prompts'
        cache 0.58, temporaries 1.57
      opsd probe memos, closed   24.40   71.34 left
        parameters 1.91, the teacher's 1.91, weights for sampling 15.26, cache 2.41, prompts'
        cache 1.08, temporaries 1.84
      opsd probe                  5.55   90.19 left
        parameters 1.91, the teacher's 1.91, temporaries 1.73
      evaluation                 23.30   72.44 left
        parameters 1.91, weights for sampling 15.26, cache 4.50, prompts' cache 0.06,
        temporaries 1.57

    of a device:                          compile     HBM  temporaries    TFLOP    moved  network
                                                s     GiB          GiB               GiB      GiB
      reshard                                   1   28.88        11.72        0     49.6     15.3
      opsd rollouts: start                      0    1.13         0.00        0     1.13        0
      opsd rollouts: prefill                   14   15.05         0.09     16.3     32.4     1.26
      opsd rollouts: admit to 9216              7    1.34         0.15        0     1.62     0.25
      opsd rollouts: decode in 9216            53   17.95         1.57     2.05      982    0.158
      opsd memos: start                         0    2.16         0.00        0     2.16        0
      opsd memos: prefill                      13   16.46         0.98      171      210     11.7
      opsd memos: admit to 17664                7    3.38         0.65        0     16.5     2.31
      opsd memos: decode in 17664              66   18.98         1.57     2.05     1048    0.158
      opsd memos, closed: start                 0    2.41         0.00        0     2.41        0
      opsd memos, closed: prefill              28   17.81         1.84      357      375     21.7
      opsd memos, closed: admit to 19712        8    4.76         1.28        0     31.3     4.31
      opsd memos, closed: decode in 19712      57   19.23         1.57     2.05     1100    0.158
      opsd: train step                        165   14.48         7.80     1793     5459      634
      opsd: probe                              53    5.55         1.73      401     1271      144
      evaluation: start                         0    4.50         0.00        0      4.5        0
      evaluation: prefill                      17   15.05         0.09     16.3     32.4     1.26
      evaluation: admit to 9216                 4    4.71         0.15        0     1.62     0.25
      evaluation: decode in 9216               29   21.33         1.57     8.19     1066    0.633

    roofline, s: at best; with products, memory and network one after the other
      opsd reshard                   0.1      0.1
      opsd rollouts                 24.4     24.9
      opsd memos                    26.8     27.5
      opsd memos, closed             8.4      9.2
      opsd step                      5.6     11.6
      opsd probe memos             856.0    879.9
      opsd probe memos, closed     268.2    292.9
      opsd probe                    86.8    174.2
      evaluation                   106.0    112.1
      for responses of 50% of their budget, full prompts, all rows active; bfloat16,
      HBM and one ring of the network at the makers' speed
"""

from opsd_jax import recipes


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
