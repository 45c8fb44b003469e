"""Stages of the hybrid style: each does all of one model's work before denoising."""
