"""Whether this machine trains Qwen3.5 rightly and at the speed it should.

`supervise` runs `worker` in a process of its own, because what is broken may take its process
along. The worker takes a `snapshot` of the machine, judges it by `rules` and `kernel_paths`, which
look at nothing else, and checks gradients. `report` prints.
"""
