"""Watch another program's system calls with ptrace, and read the Python stack of the thread that makes one.

Written here, not taken from a library, because a stopped thread is the one moment at which its stack can be read
without a race: that is how each call gets its function and line. Linux on x86-64 and aarch64.
"""
