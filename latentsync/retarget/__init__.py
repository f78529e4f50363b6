"""Show the mouth shapes of generated faces with the film's own pixels.

A small model knows how a mouth moves with a voice, but not what this person looks like. So it paints a face that it
knows well, and only the mouth's shape over time is read from that. Every frame of the film is given a mouth from
another frame with nearly that shape; its lips and chin are warped the rest of the way and composited into a soft hull
around the mouth. All other pixels stay the source's, to the bit.

    film, tracked → MouthBank.collect → mouths of the film, up to ten seconds ahead
    frames with generated faces → retarget → the frames with their new mouths

Lengths without a unit are in distances between the outer eye corners ("head units"), in a head frame whose origin lies
between the eyes and whose y axis points down the face.
"""

from latentsync.retarget.bank import MouthBank
from latentsync.retarget.geometry import mouth_points
from latentsync.retarget.stage import context_frames, held_frames, retarget

__all__ = ["MouthBank", "context_frames", "held_frames", "mouth_points", "retarget"]
