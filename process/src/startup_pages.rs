//! Releases pages of program text that were used only during startup.
//!
//! dockerd starts two docker-proxies for every published port, and rootless hosts start two
//! processes for every container. Most of them see little traffic. During startup, the kernel maps
//! a megabyte of the program and its libraries, because it maps 64 KiB around every fault
//! (`do_fault_around`, mm/memory.c). Startup code does not run again. Code for connections is
//! mapped again on first use, from the page cache.

use rustix::mm::{Advice, madvise};
use std::ffi::{c_int, c_void};

/// Unmaps all pages of program text and constants of this process.
///
/// Only read-only segments are released, because their pages are unmodified pages of the file. A
/// segment that was writable during relocation has pages that exist only in memory.
pub fn release() {
    // SAFETY: the callback has the required type and keeps no reference to its argument.
    unsafe { libc::dl_iterate_phdr(Some(release_object), std::ptr::null_mut()) };
}

/// Releases the pages of one loaded object: the program, a library or the vDSO.
unsafe extern "C" fn release_object(
    object: *mut libc::dl_phdr_info,
    _size: usize,
    _nothing: *mut c_void,
) -> c_int {
    // SAFETY: the loader passes a valid description for the duration of this call.
    let (base, headers) = unsafe {
        let object = &*object;
        (
            object.dlpi_addr,
            std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)),
        )
    };
    let page = rustix::param::page_size() as u64;
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD) {
        if header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = (base + header.p_vaddr) / page * page;
        let end = base + header.p_vaddr + header.p_memsz;
        // SAFETY: the pages are a private, unmodified mapping of a file; an access reads the same
        // bytes again. For other mappings (the vDSO), madvise fails without effect.
        let _ =
            unsafe { madvise(start as *mut c_void, (end - start) as usize, Advice::LinuxDontNeed) };
    }
    0
}
