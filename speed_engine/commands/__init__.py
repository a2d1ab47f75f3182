"""The commands of ``speed-engine``, one module each."""
