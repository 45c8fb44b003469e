"""Stages of hybrid models; each performs all work of one model before denoising."""
