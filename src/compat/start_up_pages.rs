//! Gives back the pages of program text that only starting up has used.
//!
//! dockerd starts two docker-proxies for every published port, rootless hosts two processes for
//! every container, and most of them never see much traffic. By the time one is ready, the kernel
//! has mapped a megabyte of program and libraries around what ran once (it maps 64 KiB around every
//! fault, mm/memory.c, `do_fault_around`). None of that runs again; what a connection needs comes
//! back with its first use, from the page cache.

use rustix::mm::{Advice, madvise};
use std::ffi::{c_int, c_void};

/// Lets go of every page of program text and constants that is mapped in this process.
///
/// Only the segments that the linker has marked as not writable are touched: their pages are the
/// file's own. A segment that was writable while it was relocated holds pages that exist nowhere
/// else.
pub(super) fn give_back() {
    // SAFETY: the callback fits its type and keeps nothing of what it is shown.
    unsafe { libc::dl_iterate_phdr(Some(give_back_object), std::ptr::null_mut()) };
}

/// Does so for one loaded object: the program itself, a library, the vDSO.
unsafe extern "C" fn give_back_object(
    object: *mut libc::dl_phdr_info,
    _size: usize,
    _nothing: *mut c_void,
) -> c_int {
    // SAFETY: the loader hands out a valid description, for as long as this call lasts.
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
        // SAFETY: the pages are a private, unmodified mapping of a file; whoever touches one gets
        // the same bytes again. What is mapped otherwise (the vDSO) is refused, and no worse than
        // before.
        let _ =
            unsafe { madvise(start as *mut c_void, (end - start) as usize, Advice::LinuxDontNeed) };
    }
    0
}
