"""Tasks that learn from unlabelled images what `segment`'s head is to say of them, one a file.

A task is found here by its `type`, as in `pretext/`. It reads the pool, borrows the head of `segment`, and takes its
targets from predictions: the teacher's, which `view` is handed, or the network's own for one part of its input, which
`loss` finds in the prediction without their gradient. `strong` varies images for it.
"""
