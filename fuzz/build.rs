//! The part that is in C, with branches that the fuzzer sees.

fn main() {
    for file in ["firecracker.c", "firecracker.h", "coverage.c", "../examples/c/firecracker_handler.c"] {
        println!("cargo::rerun-if-changed={file}");
    }
    let mut build = cc::Build::new();
    build.file("firecracker.c").include("../include").flag("-std=gnu11").warnings(false);
    if build.get_compiler().is_like_clang() {
        build.flag("-fsanitize-coverage=inline-8bit-counters,pc-table,trace-cmp");
    } else {
        build.flag("-fsanitize-coverage=trace-pc,trace-cmp");
        cc::Build::new().file("coverage.c").compile("coverage");
        println!("cargo::rustc-link-arg-bin=firecracker=-Wl,--wrap=__sanitizer_cov_trace_pc");
    }
    build.compile("firecracker");
}
