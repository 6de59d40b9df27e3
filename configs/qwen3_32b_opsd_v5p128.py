"""OPSD on Qwen3-32B with the paper's settings, on a v5p-128 (64 chips of 95 GB).

    opsd-jax train --config configs/qwen3_32b_opsd_v5p128.py --workdir runs/qwen3_32b_opsd_v5p128 \
        --config.model.path=/models/Qwen3-32B --config.data.train.problems.path=problems.jsonl
    opsd-jax plan --config configs/qwen3_32b_opsd_v5p128.py --topology v5p:4x4x4

Its plan (2026-11-25, jax 0.10.2, libtpu 0.0.42.1; compiled, not run):

    v5p:4x4x4: 64 x TPU v5
    mesh (data x fsdp x tensor): 1 x 16 x 4; while sampling: 1 x 16 x 4

    HBM of a device, GiB, of 95.74
      opsd rollouts            24.69   71.05 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 15.26, cache 1.12,
        prompts' cache 0.06, temporaries 1.56
      opsd memos               26.24   69.50 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 15.26, cache 2.16,
        prompts' cache 0.58, temporaries 1.56
      opsd memos, closed       27.26   68.48 left
        parameters 1.91, optimizer 3.82, teacher 0.96, weights for sampling 15.26, cache 2.41,
        prompts' cache 1.08, temporaries 1.84
      opsd step                14.48   81.26 left
        parameters 1.91, optimizer 3.82, teacher 0.96, temporaries 7.80
      evaluation               23.30   72.44 left
        parameters 1.91, weights for sampling 15.26, cache 4.50, prompts' cache 0.06,
        temporaries 1.57

    of a device:                          compile    HBM  temporaries   TFLOP   moved  network
                                                s    GiB          GiB             GiB      GiB
      reshard                                   1  28.88        11.72       0   49.58     15.3
      opsd rollouts: start                      0   1.13         0.00       0   1.125        0
      opsd rollouts: prefill                   15  15.05         0.09   16.25   32.43     1.26
      opsd rollouts: admit to 9216              9   1.34         0.15       0   1.617   0.0195
      opsd rollouts: decode in 9216            46  17.95         1.56   2.047   983.7    0.158
      opsd memos: start                         0   2.16         0.00       0   2.156        0
      opsd memos: prefill                      23  16.46         0.98   171.3   210.5     11.7
      opsd memos: admit to 17664                7   3.38         0.65       0   16.48     2.31
      opsd memos: decode in 17664              78  18.98         1.56   2.047    1050    0.158
      opsd memos, closed: start                 0   2.41         0.00       0   2.406        0
      opsd memos, closed: prefill              10  17.81         1.84   357.4   374.9     21.7
      opsd memos, closed: admit to 19712        3   4.76         1.28       0   31.27     4.31
      opsd memos, closed: decode in 19712      49  19.23         1.56   2.047    1102    0.158
      opsd: train step                        393  14.48         7.80    1809    5538      631
      opsd: probe                              97   5.55         1.73   403.7    1281      143
      evaluation: start                         1   4.50         0.00       0     4.5        0
      evaluation: prefill                      26  15.05         0.09   16.25   32.43     1.26
      evaluation: admit to 9216                16   4.71         0.15       0   1.617   0.0195
      evaluation: decode in 9216               96  21.33         1.57   8.188    1066    0.633

    roofline, s: at best; with products, memory and network one after the other
      opsd rollouts              24.5     24.9
      opsd memos                 26.8     27.5
      opsd memos, closed          8.4      9.2
      opsd step                   5.6     11.7
      evaluation                105.9    112.0
      for responses of 50% of their budget, full prompts, all rows active; bfloat16,
      HBM and one ring of the network at the makers' speed
"""

from opsd_jax import recipes


def get_config():
    """Sixteen rows at a time, each over four chips."""
    config = recipes.paper_opsd("qwen3-32b")
    config.mesh = (1, 16, 4)
    config.model.sequence_parallel = True
    config.opsd.memo.slots = 32
    return config
