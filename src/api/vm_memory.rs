//! Memory of the vm-memory crate.

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use crate::api::memory::Memory;

impl Memory<'static> {
    /// A region of a `GuestMemoryMmap`, at its own guest physical address. The slot keeps the region's mapping alive
    /// for as long as the library uses it. Needs the feature `vm-memory`.
    ///
    /// Pages are filled by copy, also where the region maps a shared file. Add [`Memory::file`] to fill them in place.
    ///
    /// ```
    /// use kuf::{Filled, Kuf, Memory, Options, Run};
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
    ///
    /// let guest = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 30), 1 << 20)])?;
    /// let options = Options::serviced(|run: &mut Run<'_>| {
    ///     run.buf().fill(7);
    ///     Filled::Done
    /// });
    /// let kuf = Kuf::open(options.user_mode_only())?;
    /// for region in guest.iter() {
    ///     kuf.add_memory(Memory::region(region))?;
    /// }
    /// assert_eq!(guest.read_obj::<u32>(GuestAddress((1 << 30) + 8192))?, 0x0707_0707);
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn region<B: Bitmap + Send + Sync + 'static>(region: &GuestRegionMmap<B>) -> Self {
        let (gpa, len) = (region.start_addr().0, region.len());
        Self::at(gpa, len, region.as_ptr().expose_provenance() as u64).keep(region.get_mmap())
    }
}
