// SPDX-License-Identifier: MIT OR Apache-2.0
//! What cargo's own `libkuf.so` needs to be safe to dlopen. The shipped library is linked by the Makefile, because a
//! version script passed through cargo leaves no version tags (rustc brings its own).

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libkuf.so.{}", env!("CARGO_PKG_VERSION_MAJOR"));
    // Thread-local destructors and service threads may run after dlclose: the code has to stay mapped.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
