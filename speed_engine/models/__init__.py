"""Denoising networks of signature ``model(x_in, t, labels)``; none knows what it predicts."""
