#!/usr/bin/env python3
"""Queries in, answers out: the same as `ragfleet pipeline`, from this tree, installed or not."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

import multi_worker_inference

if __name__ == "__main__":
    sys.exit(multi_worker_inference.main(sys.argv[1:], "pipeline"))
