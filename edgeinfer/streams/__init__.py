"""Models on a stream: state carried from chunk to chunk, sensing beside computing, one model asking for the
next."""
