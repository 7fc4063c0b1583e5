"""`sapwood bench ranks`: what ranks of one machine send each other, two ways beside each other."""
