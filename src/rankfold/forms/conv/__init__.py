"""Convs along one axis each, and Tucker-2."""
