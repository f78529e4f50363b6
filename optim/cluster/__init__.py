"""Paints one job on several GPUs, of this machine or of a Ray cluster.

    options     --gpus and --cluster; no Ray, no torch
    command     from the options of the command line to workers
    session     starts Ray on this machine, or connects to a cluster
    workers     the driver's side: hands out groups of windows, puts the results in order, replaces lost workers
    actor       the worker's side: holds the models and paints
    messages    what travels between them

The driver decodes, follows faces, cuts them out and encodes, as the single process does; only
`painting.paint_groups` has a second implementation, `workers.RayWorkers.paint_groups`. What travels is the group of
windows that the U-Net takes at once. A frame of 1080p whose face is 600 pixels wide, at 512 px: the crop 0.79 MB, 50
audio tokens 0.08 MB, the part of the frame that changes 1.1 MB there and back; 2.0 MB to the worker and 1.1 MB back
(256 px: 1.4 and 1.1). A GPU that paints 28 frames a second takes 55 MB/s, so one link of 10 Gbit/s feeds about 20 of
them. The painted face alone would be 3.1 MB (float32; float16: 1.6) and would leave pasting, 10 to 20 ms a frame of a
core, to the driver; as uint8 it would change the result. So workers paste and return finished pixels: code and bits are
those of the single process.
"""
